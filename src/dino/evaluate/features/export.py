"""Frozen features of many images: each image exactly once, in order, also over several ranks.

Shapes: n images, B batch, C channels, S pixels a side, D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from torch import Tensor

from dino.data.images.decode import as_pixels, crop_resize
from dino.data.images.readers import IMAGENET_MEAN, IMAGENET_STD
from dino.data.sources.open import Source, open_source
from dino.data.views.photometric import normalize
from dino.evaluate.features.cache import LIBRARIES, class_token, described, installed, kept_features
from dino.evaluate.features.table import FeatureTable, Pass, in_memory
from dino.files import UserError, atomic_csv, atomic_json, check_output, replacing
from dino.models.backbone import Backbone
from dino.runtime import Precision, describe, pick_device, process_group
from dino.weights.load import fingerprint, load


def extract(backbone: Backbone, source: Source, **how: Any) -> FeatureTable:
    """The feature of the paper of every image of `source`, through the backbone's own transform.

    Args:
        backbone: the network.
        source: the images.
        **how: the keyword arguments of `dino.evaluate.features.cache.described`.

    Raises:
        UserError: if no image at all can be used.
    """
    return described(backbone, source, class_token(backbone), **how)


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

    run = Pass(Squeeze(size, mean, std), compute, batch, workers, progress, "raw pixels")
    return in_memory(source, run)


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
    listing = path.with_suffix(".csv")
    rows = zip(table.paths, *_label_columns(table), strict=True)
    atomic_csv(listing, ("path", "label", "class"), rows)
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
        "weights": {
            "sha256": fingerprint(backbone),
            "architecture": backbone.spec,
            **(backbone.origin or {}),
        },
        "preprocessing": backbone.preprocessing.to_dict(),
        "settings": {key: _plain(item) for key, item in asked},
        "device": describe(next(backbone.parameters()).device),
        "versions": {name: installed(name) for name in LIBRARIES},
    }


def _plain(item: Any) -> Any:
    """A setting as JSON takes it: paths as text."""
    if isinstance(item, (tuple, list)):
        return [_plain(one) for one in item]
    return str(item) if isinstance(item, Path) else item


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Write the features of a folder of images to a file."""

    weights: str
    """Run folder, file of weights or published name."""
    data: str
    """Images: a folder, a list (.txt, .csv, .tsv, .parquet), or demo."""
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
    store: Path | None = None
    """Where features are kept, so that a command that was stopped goes on; by default in the cache
    (DINO_CACHE)."""


def run(settings: FeatureSettings) -> FeatureTable:
    """`dino features`: extract, write, print the path; F.json beside it says where it comes from.

    Raises:
        UserError: for weights or data that are not there, or another ending than known.
    """
    check_output(settings.out, (".npy", ".parquet"), siblings=(".csv", ".json"))
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        table = extract(
            backbone,
            open_source(settings.data, backbone.preprocessing.pixels),
            batch=settings.batch,
            workers=settings.workers,
            precision=settings.precision,
            store=settings.store or kept_features(),
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
