"""Features on disk: computed once, found again, and gone on with after an interruption.

A table's folder is named by everything that its numbers depend on. While it is computed, every rank
adds parts (some rows and the images they belong to), each written whole; what no part holds is
still to do, by whatever number of ranks. When all is done the parts become one file, `features.npy`
with one row an image, and `done.json` says so. Nothing here is the truth: any folder may be deleted
at any time, and is then made again.

Shapes: n images, B batch, C channels, H W pixels, N numbers an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source
from dino.evaluate.features.table import (
    FeatureTable,
    Pass,
    Rows,
    check_usable,
    in_memory,
    my_share,
    table_of,
)
from dino.files import UserError, atomic_json, cache_folder, read_json, replacing
from dino.models.backbone import Backbone
from dino.runtime import Precision, autocast, barrier, gather_objects, ranks
from dino.weights.load import fingerprint

FORMAT = 1
"""Of the folder and of the key: raised whenever older tables must not be read."""

LIBRARIES = ("dino-ssl", "torch", "torchvision", "pillow")
"""What a feature depends on, by distribution name."""

FLUSH_SECONDS = 5.0
"""How much work a killed extraction loses at most, in seconds (and the batch it was at)."""

MAPPED = 2**28
"""Tables of more bytes are mapped from their file instead of read."""

STRAY_SECONDS = 3600.0
"""After this time a temporary file belongs to nobody."""

TRANSIENT = ("missing", "unreadable")
"""Defects of the moment: such images are tried again whenever their table is opened."""


def kept_features() -> Path:
    """The folder of tables that commands use unless told otherwise."""
    return cache_folder() / "features"


@dataclass(frozen=True)
class Descriptor:
    """What is computed of an image: a transform, and a function of the network.

    Attributes:
        name: such as "cls", "cls4", "cls+gem".
        transform: from a picture to the network's input: a frozen dataclass, whose repr says all
            that it does.
        compute: from the network, in evaluation mode, and a batch to one row an image.
        settings: everything else that changes the numbers, as JSON takes it.
    """

    name: str
    transform: Callable[[Image.Image], Float[Tensor, "C H W"]]
    compute: Callable[[Backbone, Float[Tensor, "B C H W"]], Float[Tensor, "B N"]]
    settings: dict[str, Any]


def class_token(backbone: Backbone) -> Descriptor:
    """The feature of the paper through the transform of the weights: final-norm CLS, or pooled."""
    return Descriptor("cls", backbone.preprocessing, _feature, {})


def _feature(backbone: Backbone, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
    return backbone(images)


def described(
    backbone: Backbone,
    source: Source,
    descriptor: Descriptor,
    *,
    store: Path | None = None,
    batch: int = 64,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    progress: bool = True,
    title: str = "features",
) -> FeatureTable:
    """What `descriptor` says of every image of `source`, in its order.

    Images that cannot be used have no row; the table lists them, and stderr is told. In a process
    group the ranks share the images, and all get the whole table. The backbone is used in
    evaluation mode and left as it was, moved to `device`.

    Args:
        backbone: the network.
        source: the images.
        descriptor: what to compute.
        store: folder of tables that are kept: a table found there is opened, an unfinished one
            gone on with. Only images that are files are kept, since nothing tells of others
            whether they changed. None keeps nothing.
        batch: images at a time on each rank; it does not change the result. 1 for a transform that
            leaves images of different sizes.
        workers: processes that read images, on each rank.
        device: where to compute; by default where the backbone is.
        precision: fp32, or bf16 for speed (features agree to about two digits).
        progress: show a bar on a terminal.
        title: what the bar says.

    Raises:
        UserError: if no image at all can be used.
    """
    device = torch.device(device) if device is not None else next(backbone.parameters()).device
    backbone.to(device)

    def compute(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        with torch.inference_mode(), autocast(device, precision):
            return descriptor.compute(backbone, images.to(device, non_blocking=True))

    run = Pass(descriptor.transform, compute, batch, workers, progress, title)
    training = backbone.training
    backbone.eval()
    try:
        folder = None if store is None else _folder(store, backbone, source, descriptor, precision)
        if folder is None:
            return in_memory(source, run)
        return _Stored(folder, source).table(run)
    finally:
        backbone.train(training)


# ---------------------------------------------------------------------------------- the folder
def _folder(
    store: Path, backbone: Backbone, source: Source, descriptor: Descriptor, precision: Precision
) -> Path | None:
    """The folder of a table, with `about.json` in it; None where none can be kept.

    Rank 0 looks; where the ranks share no disk, nothing is kept.
    """
    folder = None
    if ranks().main and (files := files_digest(source)) is not None:
        key = {
            "format": FORMAT,
            "weights": fingerprint(backbone),
            "descriptor": descriptor.name,
            "settings": descriptor.settings,
            "transform": _said(descriptor.transform),
            "precision": precision,
            "images": len(source),
            "files": files,
            "versions": {name: installed(name) for name in LIBRARIES},
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = store / f"{descriptor.name}-{digest[:32]}"
        if not (folder / "about.json").exists():
            atomic_json(folder / "about.json", key)
    folder = gather_objects(folder)[0]
    seen = gather_objects(folder is not None and (folder / "about.json").exists())
    return folder if all(seen) else None


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
        whole = os.path.abspath(path)  # noqa: PTH100 - links stay as they are
        digest.update(os.fsencode(f"{whole}\n{mark}\n"))
    return digest.hexdigest() if found else None


def _said(transform: Any) -> str:
    text = repr(transform)
    assert " at 0x" not in text, f"{text} does not say what it does: make it a frozen dataclass"
    return text


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return None


class _Part(NamedTuple):
    """Some rows of a table, in a file of their own."""

    path: Path
    indices: list[int]
    skipped: dict[int, ImageError]

    @classmethod
    def read(cls, path: Path) -> _Part:
        """All but the rows."""
        with safe_open(path, "pt") as file:
            skipped = _errors(json.loads(file.metadata()["skipped"]))
            return cls(path, file.get_tensor("index").tolist(), skipped)

    def width(self) -> int:
        """N; 0 where there is no row."""
        with safe_open(self.path, "np") as file:
            return int(file.get_slice("features").get_shape()[1])

    def rows(self) -> np.ndarray:
        """The rows, [len(indices), N]."""
        with safe_open(self.path, "np") as file:
            rows: np.ndarray = file.get_tensor("features")
            return rows


def _plain(skipped: dict[int, ImageError]) -> dict[str, list[str]]:
    return {str(i): [error.path, error.reason, error.defect] for i, error in skipped.items()}


def _errors(plain: dict[str, list[Any]]) -> dict[int, ImageError]:
    return {int(index): ImageError(*words) for index, words in plain.items()}


class _Stored:
    """A table in its folder.

    Several processes may be at the same table, by accident or as ranks: parts have names of their
    own, a row that was computed twice is the same row, and whoever is ready first joins the parts.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.features, self.done = folder / "features.npy", folder / "done.json"

    def table(self, run: Pass) -> FeatureTable:
        """Compute what is missing, together with all ranks, and open the whole.

        Raises:
            UserError: if no image at all can be used.
        """
        pending = gather_objects(self._pending() if ranks().main else None)[0]
        if share := my_share(pending):
            self._compute(run, share)
        barrier()
        problem = gather_objects(self._join() if ranks().main else None)[0]
        if problem is not None:
            raise problem
        return self._open()

    def _skipped(self) -> dict[int, ImageError]:
        return _errors(read_json(self.done)["skipped"])

    def _parts(self) -> list[_Part]:
        found = []
        for path in sorted(self.folder.glob("part-*.safetensors")):
            with suppress(FileNotFoundError):  # another process has joined it in the meantime
                found.append(_Part.read(path))
        return found

    def _pending(self) -> list[int]:
        """The images that are still to do, and those to be tried again."""
        parts = self._parts()
        if self.done.exists():  # asked for after the parts, which go when it comes
            again = self._skipped().items()
            return sorted(index for index, error in again if error.defect in TRANSIENT)
        done: set[int] = set()
        for part in parts:
            done |= {*part.indices}
            done |= {i for i, error in part.skipped.items() if error.defect not in TRANSIENT}
        return [index for index in range(len(self.source)) if index not in done]

    def _compute(self, run: Pass, share: Sequence[int]) -> None:
        gathered: list[Rows] = []
        written = time.monotonic()
        try:
            for rows in run.over(self.source, share):
                gathered.append(rows)
                if time.monotonic() - written >= FLUSH_SECONDS:
                    self._write(gathered)
                    gathered, written = [], time.monotonic()
        finally:  # also when interrupted: what is computed is kept
            if gathered:
                self._write(gathered)

    def _write(self, gathered: Sequence[Rows]) -> None:
        indices = [index for rows in gathered for index in rows.indices]
        skipped = {i: error for rows in gathered for i, error in rows.skipped.items()}
        features = [rows.features for rows in gathered if rows.indices]
        tensors = {
            "index": torch.tensor(indices, dtype=torch.int64),
            "features": torch.cat(features) if features else torch.empty(0, 0),
        }
        with replacing(self.folder / f"part-{uuid4().hex}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"skipped": json.dumps(_plain(skipped))})

    def _join(self) -> UserError | None:
        """Put the rows of all parts into one file and mark the table as done; or say why not."""
        parts, finished = self._parts(), self.done.exists()
        skipped = self._skipped() if finished else {}
        skipped |= {i: error for part in parts for i, error in part.skipped.items()}
        found = skipped.keys() | {index for part in parts for index in part.indices}
        try:
            if not finished and len(found) < len(self.source):
                raise FileNotFoundError(f"parts of {self.folder} are gone: run the command again")
            check_usable(self.source, skipped)
            if parts:
                self._merge(parts, skipped)
        except FileNotFoundError:
            if not self.done.exists():  # else another process was faster
                raise
        except UserError as error:
            return error
        return None

    def _merge(self, parts: Sequence[_Part], skipped: dict[int, ImageError]) -> None:
        if not self.done.exists():
            width = max(part.width() for part in parts)
            with replacing(self.features) as temporary:
                shape = (len(self.source), width)
                np.lib.format.open_memmap(temporary, "w+", dtype=np.float32, shape=shape)
                self._fill(temporary, parts)
        else:  # only rows that nobody reads yet are written in place
            vacant = self._skipped().keys()
            self._fill(self.features, [part for part in parts if vacant & {*part.indices}])
        found = {index for part in parts for index in part.indices}
        left = {index: skipped[index] for index in sorted(skipped.keys() - found)}
        atomic_json(self.done, {"skipped": _plain(left)})
        for part in parts:
            part.path.unlink(missing_ok=True)
        for stray in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
            if time.time() - stray.stat().st_mtime > STRAY_SECONDS:
                stray.unlink(missing_ok=True)

    def _fill(self, path: Path, parts: Sequence[_Part]) -> None:
        table = np.lib.format.open_memmap(path, "r+")
        for part in parts:
            if part.indices:
                table[part.indices] = part.rows()
        table.flush()

    def _open(self) -> FeatureTable:
        skipped = self._skipped()
        large = self.features.stat().st_size > MAPPED
        # "c": a private copy of what is written to, which nobody does, but torch asks for it.
        rows = np.load(self.features, mmap_mode="c" if large else None, allow_pickle=False)
        used = [index for index in range(len(self.source)) if index not in skipped]
        features = torch.from_numpy(rows[used] if skipped else rows)
        return table_of(self.source, features, used, skipped)
