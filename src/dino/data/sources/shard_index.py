"""The places of images in tar shards: read once from the headers, then cached."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dino.data.images.pixel_format import EXTENSIONS, is_dicom
from dino.data.sources.byte_ranges import LONGEST_READ, RangeFile, is_remote
from dino.data.sources.folder import may_be_dicom
from dino.data.sources.packed_strings import PackedStrings
from dino.files import UserError, atomic_write, cache_folder
from dino.progress import bar
from dino.runtime import ranks

LABELS = ("cls", "txt", "json")
"""Members that may hold a sample's label: a class number, a class name, or the key "label"."""
CAPTION = "\n"
"""Stands in place of a text that is too long for a class name."""
LONGEST_NAME = 80
"""Of a class, in characters."""
THREADS = 16
"""Shards that are indexed at the same time."""
TAIL = 2**20
"""Bytes behind the end mark that are checked."""

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass
class Index:
    """Where the images of a shard lie.

    Attributes:
        version: of the shard, for `read_range`.
        names: of all members that are images.
        places: offset, size and number of the sample of each image, int64 [n, 3].
        labels: of each sample that has an image, by the kind of member; "" where it has none.
        kinds: number of members of each kind.
        damage: what is wrong with the shard, "" for nothing.
    """

    version: str
    names: PackedStrings
    places: np.ndarray
    labels: dict[str, PackedStrings]
    kinds: Counter[str]
    damage: str

    def one_image_each(self, url: str, image: str | None) -> Index:
        """The same index with one image for each sample that has one with extension `image`."""
        samples = self.places[:, 2].tolist()
        if image is None and len(set(samples)) == len(samples):
            return self
        rows: list[int] = []
        for _, group in groupby(range(len(samples)), samples.__getitem__):
            extensions = {row: _key_and_extension(self.names[row])[1] for row in group}
            found = [row for row in extensions if image in (None, extensions[row])]
            # The one without another dot; an array beside a picture is no image, as embeddings are.
            for simpler in (lambda kind: "." not in kind, lambda kind: kind != "npy"):
                if len(found) > 1:
                    found = [row for row in found if simpler(extensions[row])] or found
            if len(found) > 1:
                first, second = (extensions[row] for row in found[:2])
                raise UserError(
                    f"a sample of {url} holds several images ({self.names[found[0]]} and "
                    f".{second}): choose one, as in '{url}?image={first}'"
                )
            rows += found
        labels = {
            kind: PackedStrings(texts[samples[row]] for row in rows)
            for kind, texts in self.labels.items()
        }
        names = PackedStrings(self.names[row] for row in rows)
        return replace(self, names=names, places=self.places[rows], labels=labels)


def _key_and_extension(name: str) -> tuple[str, str]:
    """Of a member, as webdataset divides its name; two empty ones if it does not."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def index_shards(urls: Sequence[str]) -> list[Index]:
    """The index of each shard; several are read at a time.

    Raises:
        UserError: for a shard that is missing or compressed, or where an image is a link.
    """
    shown = len(urls) > 1 and ranks().main
    with ThreadPoolExecutor(THREADS) as pool, bar("shards", len(urls), shown=shown) as advance:
        indices = []
        for index in pool.map(_index, urls):  # of an error, it cancels the rest
            indices.append(index)
            advance(1)
    return indices


def _index(url: str) -> Index:
    """The index of a shard, from the cache if the shard has the same size and version."""
    file = RangeFile(url)
    key = f"3 {' '.join(EXTENSIONS)} {url if is_remote(url) else Path(url).absolute()}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    cached = cache_folder() / "shards" / f"{name}.safetensors"
    if file.version:
        with suppress(OSError, SafetensorError):  # missing or damaged: the headers are read again
            if (index := _unpacked(load_file(cached), file.version)) is not None:
                return index
    if file.read(6).startswith(_COMPRESSED):
        raise UserError(
            f"{url} is compressed, so that no single image can be read from it: unpack it to .tar "
            "(images gain next to nothing from compression)"
        )
    index = _read_index(file)
    if file.version:
        with suppress(OSError):  # a full disk, or a folder that may not be written
            atomic_write(cached, save(_packed(index)))
    return index


# ---------------------------------------------------------------------------------- headers
class DamagedArchive(Exception):
    """An archive that is damaged from a byte on, and the reason in a few words."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


def members(file: RangeFile | io.BytesIO, size: int) -> Iterator[tarfile.TarInfo]:
    """All members of an archive of `size` bytes in order, also a last one that its end cuts off.

    `tarfile` alone reports neither a damaged header nor a missing end.

    Raises:
        DamagedArchive: after the last member, unless the archive ends in an end mark.
    """
    # All that `fromtarfile` needs: a `TarFile` keeps every member, and hides what ended it.
    archive: Any = SimpleNamespace(
        fileobj=file, encoding=tarfile.ENCODING, errors="surrogateescape", pax_headers={}, offset=0
    )
    while True:
        start = file.seek(archive.offset)
        reason = "it has a damaged header"
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            file.seek(start)
            if not any(file.read(TAIL)):
                return
            reason = "more follows its end mark, as in joined archives"
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
            reason = "it ends without an end mark"
        except UserError:  # a file that cannot be read
            raise
        except Exception:  # damaged bytes raise nearly anything
            pass
        else:
            if archive.offset > start:
                yield member
                if member.isreg() and member.offset_data + member.size > size:
                    raise DamagedArchive(start, f"it ends inside {member.name}")
                continue
        raise DamagedArchive(start, reason)


def _kind(member: tarfile.TarInfo) -> Literal["file", "link", "sparse", ""]:
    if member.islnk() or member.issym():
        return "link"
    sparse = member.type == tarfile.GNUTYPE_SPARSE
    if sparse or any(name.startswith("GNU.sparse") for name in member.pax_headers):
        return "sparse"
    return "file" if member.isreg() else ""


def _read_index(file: RangeFile) -> Index:
    """The index of a shard, from the headers of its members."""
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: dict[str, dict[int, str]] = {kind: {} for kind in LABELS}  # by the sample's number
    kinds: Counter[str] = Counter()
    sample, sample_key, damage = 0, "", ""
    try:
        for member in members(file, file.size):
            key, extension = _key_and_extension(member.name)
            kind = _kind(member)
            if not kind or _META.match(member.name):
                continue
            is_image = f".{extension.rpartition('.')[2]}" in EXTENSIONS
            if kind == "file" and may_be_dicom(f".{extension.rpartition('.')[2]}".rstrip(".")):
                file.seek(member.offset_data)
                if is_dicom(file.read(min(132, member.size))):
                    key, extension, is_image = member.name, "dcm", True
            key = key or member.name
            if kind != "file":
                if is_image:
                    raise UserError(
                        f"{member.name} in {file.url} is a {kind} and no regular file: pack "
                        "it again, with tar --dereference --hard-dereference and without --sparse"
                    )
                continue
            if key != sample_key:
                sample, sample_key = sample + 1, key
            kinds[f".{extension}" if extension else ""] += 1
            if is_image:
                names.append(member.name)
                places.append((member.offset_data, member.size, sample))
            elif extension in LABELS and member.offset_data + member.size <= file.size:
                file.seek(member.offset_data)
                text = file.read(min(member.size, LONGEST_READ))
                labels[extension][sample] = _label(extension, text)
    except DamagedArchive as error:
        damage = f"{error.reason}, at byte {error.offset:,} of {file.size:,}"
        # The last sample goes if it lost a part of its image, or a label that the one before has.
        count = sum(number == sample for _, _, number in places)
        before = places[-count - 1][2] if len(places) > count else -1
        cut = any(offset + size > file.size for offset, size, _ in places[-count:])
        if count and (cut or any(of.get(before) and not of.get(sample) for of in labels.values())):
            del names[-count:], places[-count:]
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    samples, table[:, 2] = np.unique(table[:, 2], return_inverse=True)
    numbers = samples.tolist()
    texts = {kind: PackedStrings(of.get(n, "") for n in numbers) for kind, of in labels.items()}
    return Index(file.version, PackedStrings(names), table, texts, kinds, damage)


def _label(kind: str, content: bytes) -> str:
    text = content.decode("utf-8", "replace").strip()
    if kind == "json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        label = values.get("label") if isinstance(values, dict) else None
        text = str(label) if isinstance(label, (int, str)) else ""
    return text if len(text) <= LONGEST_NAME and "\n" not in text else CAPTION


def _packed(index: Index) -> dict[str, np.ndarray]:
    about = json.dumps([index.version, index.kinds, index.damage]).encode()
    arrays = {"about": np.frombuffer(about, dtype=np.uint8), "places": index.places}
    for name, strings in {"names": index.names, **index.labels}.items():
        arrays |= {f"{name}.text": strings.text, f"{name}.ends": strings.ends}
    return arrays


def _unpacked(arrays: dict[str, np.ndarray], version: str) -> Index | None:
    """The index of this version of a shard, if there is one."""
    try:
        cached_version, kinds, damage = json.loads(arrays["about"].tobytes())
        names, *labels = (
            PackedStrings.of(arrays[f"{name}.text"], arrays[f"{name}.ends"])
            for name in ("names", *LABELS)
        )
        by_kind = dict(zip(LABELS, labels, strict=True))
        index = Index(version, names, arrays["places"], by_kind, Counter(kinds), damage)
    except (KeyError, ValueError, TypeError):  # damaged, or written by another program
        return None
    return index if cached_version == version else None
