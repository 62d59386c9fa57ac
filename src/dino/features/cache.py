"""Cached features: computed once, found again, continued after an interruption.

A table's folder is named by everything that its numbers depend on. While it is computed, every rank
adds parts (some rows and the images they belong to), each written atomically; what no part holds is
still to do, by whatever number of ranks. At the end the parts become one file, `features.npy` with
one row an image, and `done.json` lists the images without a row. Any folder may be deleted at any
time, and is then computed again.

Shapes: n images, N numbers an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source
from dino.features.table import (
    FeatureBatch,
    FeatureTable,
    check_usable,
    joined,
    my_share,
    table_of,
    warn_once,
)
from dino.files import UserError, atomic_json, read_json, replacing
from dino.models.backbone import Backbone
from dino.runtime import barrier, gather_objects, ranks
from dino.weights.load import fingerprint

FORMAT = 1
"""Of the folder and of the key: raised whenever older tables must not be read."""

FLUSH_SECONDS = 5.0
"""How much work a killed extraction loses at most, in seconds (and the current batch)."""

MAPPED = 2**28
"""Tables of more bytes are mapped from their file instead of read."""

STRAY_SECONDS = 3600.0
"""After this time a temporary file belongs to no running process."""

TRANSIENT = ("missing", "unreadable")
"""Temporary defects: such images are tried again whenever their table is opened."""

Batches = Callable[[Sequence[int]], Iterator[FeatureBatch]]
"""Computes the features of the images with these indices."""


def cached_table(
    store: Path, backbone: Backbone, source: Source, key: dict[str, Any], batches: Batches
) -> FeatureTable | None:
    """The table with the descriptor `key` (JSON) in a store; all ranks compute what is missing.

    None if the images are no files, the store cannot be written (with a warning), or the ranks
    share no disk. Rank 0 decides.

    Raises:
        UserError: if no image can be used.
    """
    folder = None
    if ranks().main and (files := files_digest(source)) is not None:
        key = {
            "format": FORMAT,
            "weights": fingerprint(backbone),
            **key,
            "images": len(source),
            "files": files,
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = store / f"{key['descriptor']}-{digest[:32]}"
        try:
            if not (folder / "about.json").exists():
                atomic_json(folder / "about.json", key)
        except OSError as error:
            _warn(error)
            folder = None
    folder = gather_objects(folder)[0]
    shared = gather_objects(folder is not None and (folder / "about.json").exists())
    return _CachedTable(folder, source).table(batches) if all(shared) else None


def _warn(error: OSError) -> None:
    warn_once(f"the features are not cached ({error}): choose another folder with --store")


def files_digest(source: Source) -> str | None:
    """A hash over the names, sizes and times of the images; None unless they are files."""
    digest, found = hashlib.sha256(), False
    for index in range(len(source)):
        path = source.path(index)
        try:
            status = os.stat(path)  # noqa: PTH116 - a million times
            mark, found = f"{status.st_size} {status.st_mtime_ns}", True
        except (OSError, ValueError):
            mark = "missing"
        absolute = os.path.abspath(path)  # noqa: PTH100 - links stay as they are
        digest.update(os.fsencode(f"{absolute}\n{mark}\n"))
    return digest.hexdigest() if found else None


def versions() -> dict[str, str | None]:
    """The versions of the libraries that a feature depends on; None where one is not installed."""
    found: dict[str, str | None] = dict.fromkeys(("dino-ssl", "torch", "torchvision", "pillow"))
    for name in found:
        with suppress(PackageNotFoundError):  # dino may run from a source tree
            found[name] = version(name)
    return found


class _Part(NamedTuple):
    """Some rows of a table, in a separate file."""

    path: Path
    indices: list[int]
    skipped: dict[int, ImageError]

    @classmethod
    def read(cls, path: Path) -> _Part:
        """Everything but the rows."""
        with safe_open(path, "pt") as file:
            skipped = _errors(json.loads(file.metadata()["skipped"]))
            return cls(path, file.get_tensor("index").tolist(), skipped)

    def rows(self) -> np.ndarray:
        """The rows, [len(indices), N]."""
        with safe_open(self.path, "np") as file:
            rows: np.ndarray = file.get_tensor("features")
            return rows


def _errors(skipped: dict[str, list[Any]]) -> dict[int, ImageError]:
    """The inverse of `_json`."""
    return {int(index): ImageError(*arguments) for index, arguments in skipped.items()}


def _json(skipped: dict[int, ImageError]) -> dict[int, tuple[Any, ...]]:
    return {index: error.args for index, error in skipped.items()}


class _CachedTable:
    """A table in its folder.

    Several processes may compute the same table, by accident or as ranks: parts have unique names,
    a row that was computed twice is the same row, and the first to finish merges the parts.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.features, self.done = folder / "features.npy", folder / "done.json"

    def table(self, batches: Batches) -> FeatureTable | None:
        """All rows; None if they cannot be written."""
        pending = gather_objects(self._pending() if ranks().main else None)[0]
        share = my_share(pending)
        error = self._compute(batches, share) if share else None
        barrier()
        failed = gather_objects(error)
        if not any(failed):
            failed = gather_objects(self._merge() if ranks().main else None)
        for error in filter(None, failed):
            if isinstance(error, UserError):
                raise error
            _warn(error)
            return None
        return self._open()

    def _skipped(self) -> dict[int, ImageError]:
        return _errors(read_json(self.done)["skipped"])

    def _parts(self) -> list[_Part]:
        found = []
        for path in sorted(self.folder.glob("part-*.safetensors")):
            with suppress(FileNotFoundError):  # another process has merged it in the meantime
                found.append(_Part.read(path))
        return found

    def _pending(self) -> list[int]:
        """The images that are still to do, and those to be tried again."""
        parts = self._parts()
        if self.done.exists():  # checked after the parts, which are removed when it is written
            again = self._skipped().items()
            return sorted(index for index, error in again if error.defect in TRANSIENT)
        done = {index for part in parts for index in part.indices}
        for part in parts:
            done |= {i for i, error in part.skipped.items() if error.defect not in TRANSIENT}
        return sorted({*range(len(self.source))} - done)

    def _compute(self, batches: Batches, share: Sequence[int]) -> OSError | None:
        """Write parts for the images of a share; or return why they cannot be written."""
        gathered: list[FeatureBatch] = []
        written = time.monotonic()
        try:
            for batch in batches(share):
                gathered.append(batch)
                if time.monotonic() - written >= FLUSH_SECONDS:
                    if error := self._write(gathered):
                        return error
                    gathered, written = [], time.monotonic()
        except BaseException:  # also when interrupted, computed rows are written
            self._write(gathered)
            raise
        return self._write(gathered)

    def _write(self, gathered: Sequence[FeatureBatch]) -> OSError | None:
        indices, features, skipped = joined(gathered)
        tensors = {"index": torch.tensor(indices, dtype=torch.int64), "features": features}
        about = {"skipped": json.dumps(_json(skipped))}
        try:
            if gathered:
                with replacing(self.folder / f"part-{uuid4().hex}.safetensors") as temporary:
                    save_file(tensors, temporary, metadata=about)
        except (OSError, SafetensorError) as error:
            return error if isinstance(error, OSError) else OSError(str(error))
        return None

    def _merge(self) -> OSError | UserError | None:
        """Merge the rows of all parts into one file and mark the table as done; or return why not.

        Raises:
            FileNotFoundError: if parts have disappeared.
        """
        parts, finished = self._parts(), self.done.exists()
        skipped = self._skipped() if finished else {}
        skipped |= {i: error for part in parts for i, error in part.skipped.items()}
        found = skipped.keys() | {index for part in parts for index in part.indices}
        try:
            if not finished and len(found) < len(self.source):
                raise FileNotFoundError(f"parts of {self.folder} are gone: run the command again")
            check_usable(self.source, skipped)
            if parts:
                self._merge_parts(parts, skipped)
        except FileNotFoundError:
            if not self.done.exists():  # else another process was faster
                raise
        except (OSError, UserError) as error:
            return error
        return None

    def _merge_parts(self, parts: Sequence[_Part], skipped: dict[int, ImageError]) -> None:
        with replacing(self.features) as temporary:
            if self.done.exists():
                shutil.copyfile(self.features, temporary)
                table = np.lib.format.open_memmap(temporary, "r+")
            else:
                numbers = next(part for part in parts if part.indices).rows().shape[1]
                shape = (len(self.source), numbers)
                table = np.lib.format.open_memmap(temporary, "w+", dtype=np.float32, shape=shape)
            for part in parts:
                if part.indices:
                    table[part.indices] = part.rows()
            table.flush()
        found = {index for part in parts for index in part.indices}
        left = {index: skipped[index] for index in sorted(skipped.keys() - found)}
        atomic_json(self.done, {"skipped": _json(left)})
        for part in parts:
            part.path.unlink(missing_ok=True)
        for stray in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
            if time.time() - stray.stat().st_mtime > STRAY_SECONDS:
                stray.unlink(missing_ok=True)

    def _open(self) -> FeatureTable:
        skipped = self._skipped()
        large = self.features.stat().st_size > MAPPED
        # "c", a private copy of written pages: nothing writes, but torch requires writable memory.
        rows = np.load(self.features, mmap_mode="c" if large else None, allow_pickle=False)
        used = [index for index in range(len(self.source)) if index not in skipped]
        features = torch.from_numpy(rows[used] if skipped else rows)
        return table_of(self.source, FeatureBatch(used, features, skipped))
