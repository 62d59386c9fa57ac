"""The index of a folder: a feature for each image, kept up to date, and searched.

A folder of plain files. `index.json` names the other two, which are written under new names, and is
replaced last: a reader finds the old index or the new one, never a mixture.

index.json          weights by hash, preprocessing, settings, versions; images without a feature
features-ID.npy     float32 [n, D], rows of length 1, in the order of the source
images-ID.csv       path, size and time of change of the image of each row

In float32 cosines agree with those in float64 to 7e-7, and the search reads the rows where they
are. In float16, half the bytes, they differ by up to 2.1e-4, which changed the 20 nearest of 0.4 %
of 3,925 images (Imagenette, ViT-Tiny), and a query takes as long.

Shapes: n images, D embed_dim, q queries.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino.data.images.image_errors import ImageError
from dino.data.sources.base import shared_folder
from dino.data.sources.open import Source, open_source
from dino.data.sources.packed_strings import PackedStrings
from dino.features.cache import STRAY_SECONDS, TRANSIENT
from dino.features.command import provenance
from dino.features.extractor import extract
from dino.features.search import nearest
from dino.features.table import (
    NO_ROWS,
    NoUsableImage,
    Subset,
    check_finite,
    check_usable,
    warn_skipped,
)
from dino.files import (
    UserError,
    atomic_csv,
    atomic_json,
    cache_folder,
    check_output,
    csv_text,
    disk_errors,
    read_json,
    replacing,
)
from dino.models.backbone import Backbone
from dino.runtime import Precision
from dino.weights.load import fingerprint

FORMAT = 1
"""Of the folder."""

BLOCK = 2**16
"""Rows that are copied at a time."""

NO_FEATURE = np.iinfo(np.int64).min
"""In place of a row, for an image without one."""


@dataclass(frozen=True)
class IndexSettings:
    """What, beside weights and preprocessing, decides the numbers of an index."""

    precision: Precision
    feature: str = "cls"


Skipped = dict[str, tuple[int, int, str, Any]]
"""Images that could not be used, by path: size, time of change, reason, defect."""


@dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
        folder: its files.
        features: of length 1 (a feature of zeros stays zero), mapped from the file.
        paths: of the image of each row, absolute.
        files: of each row's image: size in bytes, and time of change in nanoseconds.
        skipped: images that could not be used and have no row.
        about: what `index.json` holds: "weights", "preprocessing", "settings", "versions", ...
    """

    folder: Path
    features: Float[Tensor, "n D"]
    paths: PackedStrings
    files: Int[np.ndarray, "n 2"] = field(repr=False)
    skipped: list[ImageError]
    about: dict[str, Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def root(self) -> str:
        """The folder that all images lie in, however deep."""
        return shared_folder(self.paths)

    def name(self, row: int) -> str:
        """The path of an image below `root`."""
        return self.paths[row].removeprefix(self.root).lstrip(os.sep)

    def nearest(
        self, queries: Float[Tensor, "q D"], k: int, **options: Any
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Cosines of the k most similar images (or all), best first, and rows; see `search`."""
        most = len(self) - (options.get("skip") is not None)
        return nearest(queries, self.features, min(k, most), unit=True, **options)


# ------------------------------------------------------------------------------------- reading
def read_index(folder: str | Path, backbone: Backbone | None = None) -> Index:
    """The index in a folder as it is, whether or not its images have changed.

    Args:
        folder: of the index.
        backbone: the network whose features will be compared with it.

    Raises:
        UserError: if there is no index, it is damaged, or other weights made it.
    """
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise UserError(f"{folder} holds no index.json: give the folder of an index")
    for _ in range(3):  # another process may replace it meanwhile, and remove its files
        about = read_json(folder / "index.json")
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise UserError(f"{folder} holds an index that this version of dino cannot read")
        made_by = about["weights"]["sha256"]
        if backbone is not None and made_by != fingerprint(backbone):
            raise UserError(
                f"{folder} is an index of other weights (sha256 {made_by[:12]}...): give those "
                "weights, or choose another folder"
            )
        with suppress(FileNotFoundError):
            return _read(folder, about)
    raise UserError(f"{folder} lacks files that its index.json names: remove the folder")


def _read(folder: Path, about: dict[str, Any]) -> Index:
    paths, files = [], []
    listing = folder / f"images-{about['id']}.csv"
    try:
        with listing.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.reader(file)
            next(lines)
            for path, size, modified in lines:
                paths.append(csv_text(path))
                files.append((int(size), int(modified)))
        # "c", a private copy of written pages: nothing writes, but torch requires writable memory.
        rows = np.load(folder / f"features-{about['id']}.npy", mmap_mode="c", allow_pickle=False)
    except (ValueError, StopIteration, EOFError) as error:
        raise UserError(f"the index {folder} is damaged ({error}): remove the folder") from None
    if rows.dtype != np.float32 or rows.shape != (about["images"], about["embed_dim"]):
        raise UserError(f"the index {folder} is damaged (its features): remove the folder")
    return Index(
        folder,
        torch.from_numpy(rows),
        PackedStrings(paths),
        np.array(files, np.int64).reshape(-1, 2),
        [_error(path, about["skipped"]) for path in about["skipped"]],
        about,
    )


def _error(path: str, skipped: Skipped) -> ImageError:
    return ImageError(path, *skipped[path][2:])


# ------------------------------------------------------------------------------------- updating
@disk_errors()
def open_index(
    backbone: Backbone,
    images: Any,
    folder: str | Path | None = None,
    *,
    precision: Precision = "fp32",
    option: str = "--index",
    **options: Any,
) -> Index:
    """The index of images, up to date: only new and changed ones are computed.

    A file has changed if its size or its time of change has. Images that are gone lose their row.
    Interrupted, the next call continues. Features are taken from the store of `extract` where it
    holds them (so that ranks can compute them before); the index itself is for one process.

    Args:
        backbone: on the device where it computes.
        images: what `open_source` takes, as far as the images are files.
        folder: of the index; by default one in the cache (DINO_CACHE) for these weights and images.
        precision: of the network.
        option: the name of `folder` in messages.
        options: `workers`, `batch` and `store` of `extract`; none changes the result.

    Raises:
        UserError: if the folder cannot be written or holds an index of other weights or settings,
            the images are no files, or none can be used.
    """
    source = open_source(images, backbone.preprocessing.pixels)
    made = provenance(backbone, IndexSettings(precision))
    place = _default_place(images, source, made) if folder is None else Path(folder)
    check_output(place, folder=True, option=option)
    old = read_index(place, backbone) if (place / "index.json").exists() else None
    if old is not None:
        _check_settings(old, made)
    paths, files = _files_of(source)
    rows, skipped = _known(old, paths, files)
    todo = [i for i in np.flatnonzero(rows == NO_FEATURE).tolist() if paths[i] not in skipped]
    options = {"store": cache_folder() / "features", "precision": precision, **options}
    fresh, errors = _computed(backbone, source, todo, rows, **options)
    for i, error in errors.items():
        size, modified = files[i].tolist()
        skipped[paths[i]] = (size, modified, error.reason, error.defect)
    missing = np.flatnonzero(rows == NO_FEATURE).tolist()
    check_usable(source, {i: _error(paths[i], skipped) for i in missing})
    skipped = {paths[i]: skipped[paths[i]] for i in missing}  # in the order of the source
    used = np.flatnonzero(rows != NO_FEATURE)
    listing = PackedStrings([paths[i] for i in used.tolist()])
    about = {**made, "data": str(images), "skipped": skipped}
    if old is None or len(fresh) or not _same(old, listing, files[used], skipped):
        _write(place, old, fresh, rows[used], listing, files[used], about)
        old = read_index(place)
    warn_skipped(old.skipped, len(paths))
    return old


def _default_place(images: Any, source: Source, made: dict[str, Any]) -> Path:
    named = isinstance(images, (str, os.PathLike))
    data = os.path.abspath(images) if named else source.digest()  # noqa: PTH100 - links stay
    key = json.dumps([data, made["weights"]["sha256"], made["preprocessing"], made["settings"]])
    return cache_folder() / "index" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _check_settings(old: Index, made: dict[str, Any]) -> None:
    for name in ("preprocessing", "settings"):
        there, here = old.about[name], made[name]
        if there != here:
            raise UserError(
                f"{old.folder} is an index with other {name} ({there} there, {here} here): choose "
                "another folder"
            )


def _files_of(source: Source) -> tuple[list[str], Int[np.ndarray, "n 2"]]:
    """Absolute path, size and time of change of each image; -1 where there is no file."""
    paths = [os.path.abspath(source.path(i)) for i in range(len(source))]  # noqa: PTH100
    files = np.full((len(paths), 2), -1, np.int64)
    for i, path in enumerate(paths):
        with suppress(OSError, ValueError):
            status = os.stat(path)  # noqa: PTH116 - a million times
            files[i] = status.st_size, status.st_mtime_ns
    if (files < 0).all():
        raise UserError("an index is of image files, and these are none: give a folder of images")
    return paths, files


def _known(
    old: Index | None, paths: Sequence[str], files: Int[np.ndarray, "n 2"]
) -> tuple[Int[np.ndarray, " n"], Skipped]:
    """For each image its row in the old index, or `NO_FEATURE`; and those known to be unusable."""
    rows = np.full(len(paths), NO_FEATURE)
    if old is None:
        return rows, {}
    place = {path: row for row, path in enumerate(old.paths)}
    for i, path in enumerate(paths):
        row = place.get(path)
        if row is not None and (old.files[row] == files[i]).all():
            rows[i] = row
    skipped: Skipped = {}
    for path, file in zip(paths, files.tolist(), strict=True):
        known = old.about["skipped"].get(path)
        if known is not None and known[:2] == file and known[3] not in TRANSIENT:
            skipped[path] = tuple(known)
    return rows, skipped


def _computed(
    backbone: Backbone, source: Source, todo: list[int], rows: Int[np.ndarray, " n"], **options: Any
) -> tuple[Float[Tensor, "m D"], dict[int, ImageError]]:
    """Features of the images to do, and the unusable ones by index.

    Row r of the features is noted in `rows` as -1 - r, at its image.
    """
    if not todo:
        return NO_ROWS, {}
    try:
        table = extract(backbone, Subset(source, todo), **options)
    except NoUsableImage as error:  # of the new ones
        return NO_ROWS, dict(zip(todo, error.skipped, strict=True))
    check_finite(table.features)
    usable = [todo[i] for i in table.indices]
    rows[usable] = -1 - np.arange(len(usable))
    unusable = sorted({*todo} - {*usable})
    return table.features, dict(zip(unusable, table.skipped, strict=True))


def _same(
    old: Index, paths: PackedStrings, files: Int[np.ndarray, "n 2"], skipped: Skipped
) -> bool:
    return (
        np.array_equal(old.files, files)
        and np.array_equal(old.paths.ends, paths.ends)
        and np.array_equal(old.paths.text, paths.text)
        and old.about["skipped"] == {path: list(what) for path, what in skipped.items()}
    )


def _write(
    place: Path,
    old: Index | None,
    fresh: Float[Tensor, "m D"],
    rows: Int[np.ndarray, " n"],
    paths: PackedStrings,
    files: Int[np.ndarray, "n 2"],
    about: dict[str, Any],
) -> None:
    """Write an index whose rows are those of an old one, or (-1 - r) of fresh features."""
    name = _name(paths, files, about)
    embed_dim = old.features.shape[1] if old is not None else fresh.shape[1]
    with replacing(place / f"features-{name}.npy") as temporary:
        shape = (len(rows), embed_dim)
        table = np.lib.format.open_memmap(temporary, "w+", dtype=np.float32, shape=shape)
        for start in range(0, len(rows), BLOCK):
            some, block = rows[start : start + BLOCK], table[start : start + BLOCK]
            if old is not None:
                block[some >= 0] = old.features.numpy()[some[some >= 0]]
            if len(fresh):
                new = torch.from_numpy(-1 - some[some < 0])
                block[some < 0] = F.normalize(fresh[new], dim=1)
        table.flush()
        del table
    lines = ((path, *file) for path, file in zip(paths, files.tolist(), strict=True))
    counts = {"format": FORMAT, "id": name, "images": len(rows), "embed_dim": embed_dim}
    try:
        atomic_csv(place / f"images-{name}.csv", ("path", "size", "modified_ns"), lines)
        atomic_json(place / "index.json", {**counts, **about})
    except BaseException:
        if old is None or old.about["id"] != name:
            for new in (f"features-{name}.npy", f"images-{name}.csv"):
                (place / new).unlink(missing_ok=True)
        raise
    _clean(place, name, None if old is None else old.about["id"])


def _name(paths: PackedStrings, files: Int[np.ndarray, "n 2"], about: dict[str, Any]) -> str:
    """The ID of an index, of all that its features depend on."""
    made = [about["weights"]["sha256"], about["preprocessing"], about["settings"]]
    digest = hashlib.sha256(json.dumps(made).encode())
    for array in (paths.text, paths.ends, files):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def _clean(place: Path, current: str, previous: str | None) -> None:
    """Remove the files of the previous index, and those of processes that were killed."""
    for path in [*place.glob("*-*.*"), *place.glob(".*.tmp")]:
        with suppress(OSError):  # Windows keeps a file that is mapped
            stray = time.time() - path.stat().st_mtime > STRAY_SECONDS
            ours = path.name.startswith(
                ("features-", "images-", "map-", ".features-", ".images-", ".map-")
            )
            name = path.stem.rpartition("-")[2]
            if ours and name != current and (stray or name == previous):
                path.unlink()
