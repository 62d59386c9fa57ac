"""Frozen features of many images: each image exactly once, in order, also over several ranks.

Shapes: n images, B batch, C channels, S pixels a side, D width.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from rich.console import Console
from torch import Tensor

from dino.data.decode import as_pixels, crop_resize
from dino.data.defects import ImageError, count_defects
from dino.data.formats import IMAGENET_MEAN, IMAGENET_STD
from dino.data.loader import evaluation_loader
from dino.data.photometric import normalize
from dino.data.sources import Source, open_source
from dino.files import UserError, atomic_json, atomic_write, replacing
from dino.models.features import Backbone
from dino.progress import bar
from dino.runtime import (
    Precision,
    autocast,
    describe,
    gather_objects,
    pick_device,
    process_group,
    ranks,
)
from dino.weights.load import fingerprint, load

LIBRARIES = ("dino-ssl", "torch", "torchvision", "pillow")
"""What a feature depends on, by distribution name."""


@dataclass(frozen=True)
class FeatureTable:
    """Features of the images of one source, in its order.

    Attributes:
        features: float32, on the CPU.
        labels: one class a row, an index into `classes`; None for unlabelled images.
        paths: where each image came from.
        classes: names of the classes, if they have any.
        skipped: the images that could not be used and have no row.
    """

    features: Float[Tensor, "n D"]
    labels: Int[Tensor, " n"] | None
    paths: list[str]
    classes: list[str] | None
    skipped: list[ImageError] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


class Part:
    """Some images of a source, in the given order: itself a `Source`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        self.labels = None if source.labels is None else [source.labels[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image | Tensor:
        return self.source[self.indices[index]]

    def path(self, index: int) -> str:
        """Where image `index` of this part lies, for messages."""
        return self.source.path(self.indices[index])


def extract(
    backbone: Backbone,
    source: Source,
    *,
    batch: int = 64,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    progress: bool = True,
    title: str = "features",
) -> FeatureTable:
    """The feature of every image of `source`, in its order, through the backbone's own transform.

    Images that cannot be used have no row; the table lists them, and stderr is told. In a process
    group each rank computes a contiguous share and all get the whole table. The backbone is used in
    evaluation mode and left as it was, moved to `device`.

    Args:
        backbone: the network.
        source: the images.
        batch: images at a time on each rank; it does not change the result.
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

    def compute(images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        with torch.inference_mode(), autocast(device, precision):
            return backbone(images.to(device, non_blocking=True))

    training = backbone.training
    backbone.eval()
    try:
        return _table(source, backbone.preprocess, compute, batch, workers, progress, title)
    finally:
        backbone.train(training)


def pixels(
    source: Source,
    size: int = 32,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    batch: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> FeatureTable:
    """Raw pixels as features: each image squeezed to size x size, normalised and flattened.

    What a network has to beat: the k-NN accuracy of colours in places. Normalised as networks get
    them, since the cosine similarity of pixels that are all positive says little but how bright
    they are (on Imagenette 27 % instead of 37 %, k = 20).
    """

    def compute(images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        return images.flatten(1)

    return _table(source, Squeeze(size, mean, std), compute, batch, workers, progress, "raw pixels")


@dataclass(frozen=True)
class Squeeze:
    """A transform to `size` x `size` normalised pixels, without regard to the aspect ratio."""

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image | Tensor) -> Float[Tensor, "C S S"]:
        """Bicubic, antialiased."""
        raw = as_pixels(image)
        whole = (0, 0, raw.shape[1], raw.shape[2])
        return normalize(crop_resize(raw, whole, self.size, False), self.mean, self.std)


def _table(
    source: Source,
    transform: Callable[[Any], Tensor],
    compute: Callable[[Tensor], Tensor],
    batch: int,
    workers: int,
    progress: bool,
    title: str,
) -> FeatureTable:
    # Those who answer share the work: without a process group that is this process alone.
    rank = ranks().rank
    members, count = gather_objects(rank), len(source)
    place, world = members.index(rank), len(members)
    share = range(count * place // world, count * (place + 1) // world)
    rows: Tensor | None = None
    kept: list[int] = []
    skipped: list[ImageError] = []
    with bar(title, len(share), shown=progress and rank == 0) as advance:
        for part in evaluation_loader(Part(source, share), transform, batch, workers):
            skipped += part.skipped
            advance(len(part.index) + len(part.skipped))
            if len(part.index) == 0:
                continue
            found = compute(part.images).float().cpu()
            if rows is None:  # the whole share at once, so that nothing is held twice
                rows = torch.empty(len(share), found.shape[1])
            rows[len(kept) : len(kept) + len(found)] = found
            kept += [share[position] for position in part.index.tolist()]
    mine = None if rows is None else rows[: len(kept)]
    shares, all_kept, all_skipped = zip(*gather_objects((mine, kept, skipped)), strict=True)
    tensors = [part for part in shares if part is not None]
    unusable = list(chain.from_iterable(all_skipped))
    if not tensors:
        raise UserError(
            f"none of the {count:,} images can be used, the first because {unusable[0]}"
        )
    if unusable and rank == 0:
        _tell_once(_describe_skipped(unusable, count))
    used = list(chain.from_iterable(all_kept))
    return FeatureTable(
        features=tensors[0] if len(tensors) == 1 else torch.cat(tensors),
        labels=None if source.labels is None else torch.tensor([source.labels[i] for i in used]),
        paths=[source.path(index) for index in used],
        classes=source.classes,
        skipped=unusable,
    )


def _describe_skipped(skipped: Sequence[ImageError], count: int) -> str:
    """A sentence for the user on the images, of `count`, that have no feature."""
    return (
        f"{len(skipped):,} of {count:,} images could not be used and were left out "
        f"({count_defects(error.defect for error in skipped)}), the first: {skipped[0]}"
    )


@lru_cache(maxsize=1024)
def _tell_once(text: str) -> None:
    """Say it on stderr; a network is measured many times on the same images."""
    Console(stderr=True).print(text, style="yellow", highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------- files
def save(table: FeatureTable, path: str | Path) -> list[Path]:
    """Write a table: `F.npy` with `F.csv` beside it (path, label, class), or one `F.parquet`.

    Returns:
        The files written.

    Raises:
        UserError: for another ending than .npy or .parquet.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        _save_parquet(table, path)
        return [path]
    _check_ending(path)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, table.features.numpy())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "class"])
    writer.writerows(zip(table.paths, *_label_columns(table), strict=True))
    listing = path.with_suffix(".csv")
    atomic_write(listing, text.getvalue())
    return [path, listing]


def _check_ending(path: Path) -> None:
    if path.suffix not in (".npy", ".parquet"):
        raise UserError(f"features go into F.npy or F.parquet, not {path.name}: change --out")


def _label_columns(table: FeatureTable) -> tuple[list[int | None], list[str | None]]:
    if table.labels is None:
        return [None] * len(table), [None] * len(table)
    labels = table.labels.tolist()
    return labels, [table.classes[label] if table.classes else None for label in labels]


def _save_parquet(table: FeatureTable, path: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "a Parquet file needs pyarrow: pip install 'dino-ssl[parquet]', or choose a .npy file"
        ) from None
    labels, names = _label_columns(table)
    flat = pa.array(table.features.numpy().reshape(-1))
    columns = {
        "path": pa.array(table.paths, pa.string()),
        "label": pa.array(labels, pa.int64()),
        "class": pa.array(names, pa.string()),
        "feature": pa.FixedSizeListArray.from_arrays(flat, table.features.shape[1]),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def provenance(backbone: Backbone, settings: Any) -> dict[str, Any]:
    """Where a result comes from: weights by hash, preprocessing, settings, versions, device.

    Args:
        backbone: the network that was measured.
        settings: the dataclass of the command.
    """
    asked = dataclasses.asdict(settings).items()
    return {
        "weights": {"sha256": fingerprint(backbone), "architecture": backbone.spec},
        "preprocessing": backbone.preprocessing.to_dict(),
        "settings": {key: str(item) if isinstance(item, Path) else item for key, item in asked},
        "device": describe(next(backbone.parameters()).device),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return None


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Write the features of a folder of images to a file."""

    weights: str
    """Run folder, file of weights or published name."""
    data: str
    """Images: whatever `dino pretrain --data` takes."""
    out: Path
    """F.npy (with F.csv beside it) or F.parquet."""
    batch: int = 64
    """Images at a time."""
    workers: int = 4
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """fp32, or bf16 for speed."""


def run(settings: FeatureSettings) -> FeatureTable:
    """`dino features`: extract, write, print the path; F.json beside it says where it comes from.

    Raises:
        UserError: for weights or data that are not there, or another ending than known.
    """
    _check_ending(settings.out)
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        table = extract(
            backbone,
            open_source(settings.data, backbone.preprocessing.pixels),
            batch=settings.batch,
            workers=settings.workers,
            precision=settings.precision,
        )
        if here.main:
            files = save(table, settings.out)
            shape = {
                "images": len(table),
                "width": table.features.shape[1],
                "skipped": [error.path for error in table.skipped],
            }
            about = {**shape, "classes": table.classes, **provenance(backbone, settings)}
            atomic_json(settings.out.with_suffix(".json"), about)
            Console().print(f"{files[0]}", highlight=False, soft_wrap=True)
    return table
