"""Where images lie in tar shards: found once by reading the headers, then cached."""

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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.byte_ranges import LONGEST_READ, RangeFile, examine, is_remote
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
"""Shards that are indexed at a time."""
TAIL = 2**20
"""Bytes behind the end mark that are checked."""

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass
class Index:
    """Where the images of a shard lie.

    Attributes:
        version: of the shard, for `read_range`.
        names: of all members that are images.
        places: offset, size and the number of the sample of each of them: int64 [n, 3].
        labels: of each sample that has an image, by the kind of member; "" where it has none.
        kinds: how often each kind of member occurs.
        damage: what is wrong with the shard, "" for nothing.
    """

    version: str
    names: PackedStrings
    places: np.ndarray
    labels: dict[str, PackedStrings]
    kinds: Counter[str]
    damage: str

    def chosen(self, url: str, image: str | None) -> tuple[PackedStrings, np.ndarray]:
        """Name, and offset and size [n, 2], of each sample's image; `labels` becomes theirs."""
        samples = self.places[:, 2]
        if image is None and (len(samples) == 0 or samples[-1] + 1 == len(samples)):
            return self.names, self.places[:, :2]
        of_sample: dict[int, list[tuple[int, str]]] = {}
        for row, (name, sample) in enumerate(zip(self.names, samples.tolist(), strict=True)):
            of_sample.setdefault(sample, []).append((row, _parts(name)[1]))
        samples_of_rows, rows = [], []
        for sample, found in of_sample.items():
            wanted = [pair for pair in found if image in (None, pair[1])]
            # The one without another dot; an array beside a picture is no image, as embeddings are.
            for plain in (lambda kind: "." not in kind, lambda kind: kind != "npy"):
                if len(wanted) > 1:
                    wanted = [pair for pair in wanted if plain(pair[1])] or wanted
            if len(wanted) > 1:
                raise UserError(
                    f"a sample of {url} holds several images ({self.names[wanted[0][0]]} and "
                    f".{wanted[1][1]}): choose one, as in '{url}?image={wanted[0][1]}'"
                )
            samples_of_rows += [sample] * len(wanted)
            rows += [row for row, _ in wanted]
        self.labels = {
            kind: PackedStrings(labels[sample] for sample in samples_of_rows)
            for kind, labels in self.labels.items()
        }
        return PackedStrings(self.names[row] for row in rows), self.places[rows, :2].reshape(-1, 2)


def _parts(name: str) -> tuple[str, str]:
    """Key and extension of a member, as webdataset divides them; two empty ones for neither."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def index_shards(urls: Sequence[str]) -> list[Index]:
    """The index of each shard; several are read at a time.

    Raises:
        UserError: for a shard that is missing or compressed, or where an image is a link.
    """
    with (
        ThreadPoolExecutor(THREADS) as pool,
        bar("shards", len(urls), shown=len(urls) > 1 and ranks().main) as advance,
    ):
        found = []
        try:
            for index in pool.map(_index, urls):
                found.append(index)
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # do not wait for the rest
            raise
    return found


def _index(url: str) -> Index:
    """The index of a shard, from the cache if the shard is as it was."""
    size, version = examine(url)
    key = f"1 {' '.join(EXTENSIONS)} {url if is_remote(url) else Path(url).absolute()}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    cached = cache_folder() / "shards" / f"{name}.safetensors"
    if version:
        with suppress(OSError, SafetensorError):  # missing or damaged: the headers are read again
            if (index := _unpacked(load_file(cached), size, version)) is not None:
                return index
    file = RangeFile(url, version, size)
    if file.read(2) == b"\x1f\x8b":
        raise UserError(f"{url} is compressed by gzip, whatever its name: unpack it first")
    index = _Indexer(file).index()
    if version:
        with suppress(OSError):  # a full disk, or a folder that may not be written
            atomic_write(cached, save(_packed(index, size)))
    return index


# ---------------------------------------------------------------------------------- headers
class DamagedArchive(Exception):
    """What is wrong with an archive, in a few words, from which byte on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


def members(file: RangeFile | io.BytesIO, size: int) -> Iterator[tarfile.TarInfo]:
    """All members of an archive in order, up to its end mark; their contents are not read.

    `tarfile` alone ends without a word at a damaged header or a missing end.

    Args:
        file: the archive.
        size: of it in bytes.

    Yields:
        Each member, also a last one that the archive's end cuts off.

    Raises:
        DamagedArchive: after the last member that can be read, if the archive does not end as it
            should.
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


class _Indexer:
    """Goes through the members of one shard."""

    def __init__(self, file: RangeFile) -> None:
        self.file = file
        self.kinds: Counter[str] = Counter()
        self.names: list[str] = []
        self.places: list[tuple[int, int, int]] = []
        self.labels: dict[str, list[str]] = {kind: [] for kind in LABELS}
        self._key, self._found = "", dict.fromkeys(LABELS, "")
        self._sample, self._has_image = -1, False

    def index(self) -> Index:
        damage, size = "", self.file.size
        try:
            for member in members(self.file, size):
                self._take(member)
        except DamagedArchive as error:
            damage = f"{error.reason}, at byte {error.offset:,} of {size:,}"
            self._drop_part(size)
        self._close()
        return Index(
            self.file.version,
            PackedStrings(self.names),
            np.array(self.places, dtype=np.int64).reshape(-1, 3),
            {kind: PackedStrings(labels) for kind, labels in self.labels.items()},
            self.kinds,
            damage,
        )

    def _take(self, member: tarfile.TarInfo) -> None:
        key, extension = _parts(member.name)
        kind = _kind(member)
        if not kind or not key or _META.match(member.name):
            return
        image = f".{extension.rpartition('.')[2]}" in EXTENSIONS
        if kind != "file":
            if image:
                raise UserError(
                    f"{member.name} in {self.file.url} is a {kind} and no regular file: pack "
                    "it again, with tar --dereference --hard-dereference and without --sparse"
                )
            return
        if key != self._key:
            self._close()
            self._key = key
        self.kinds[f".{extension}"] += 1
        if image:
            self._sample += not self._has_image
            self._has_image = True
            self.names.append(member.name)
            self.places.append((member.offset_data, member.size, self._sample))
        elif extension in LABELS and member.offset_data + member.size <= self.file.size:
            self.file.seek(member.offset_data)
            text = self.file.read(min(member.size, LONGEST_READ))
            self._found[extension] = _label(extension, text)

    def _drop_part(self, size: int) -> None:
        """Forget the last sample if the damage took a part of it: its image, or a label."""
        places = [place for place in self.places if place[2] == self._sample and self._has_image]
        cut = any(offset + length > size for offset, length, _ in places)
        lacks = any(
            labels and labels[-1] and not self._found[kind] for kind, labels in self.labels.items()
        )
        if places and (cut or lacks):
            del self.places[-len(places) :], self.names[-len(places) :]
            self._sample -= 1
            self._has_image = False

    def _close(self) -> None:
        """End a sample."""
        for kind, label in self._found.items():
            if self._has_image:
                self.labels[kind].append(label)
            self._found[kind] = ""
        self._has_image = False


def _label(kind: str, content: bytes) -> str:
    text = content.decode("utf-8", "replace").strip()
    if kind == "json":
        try:
            about = json.loads(text)
        except ValueError:
            return ""
        label = about.get("label") if isinstance(about, dict) else None
        text = str(label) if isinstance(label, (int, str)) else ""
    return text if len(text) <= LONGEST_NAME and "\n" not in text else CAPTION


def _packed(index: Index, size: int) -> dict[str, np.ndarray]:
    about = [size, index.version, index.kinds, index.damage]
    text = json.dumps(about).encode()
    arrays = {"about": np.frombuffer(text, dtype=np.uint8), "places": index.places}
    for name, strings in {"names": index.names, **index.labels}.items():
        arrays |= {f"{name}.text": strings.text, f"{name}.ends": strings.ends}
    return arrays


def _unpacked(arrays: dict[str, np.ndarray], size: int, version: str) -> Index | None:
    try:
        cached_size, cached_version, kinds, damage = json.loads(arrays["about"].tobytes())
        names, *labels = (
            PackedStrings.of(arrays[f"{name}.text"], arrays[f"{name}.ends"])
            for name in ("names", *LABELS)
        )
        places = arrays["places"]
    except (KeyError, ValueError, TypeError):  # none, or not written here
        return None
    if (cached_size, cached_version) != (size, version):
        return None
    by_kind = dict(zip(LABELS, labels, strict=True))
    return Index(version, names, places, by_kind, Counter(kinds), damage)
