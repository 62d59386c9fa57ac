"""Write the features of many images to a file: NumPy with a CSV, or Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro

from dino.data.sources.open import open_source
from dino.features.command import Count, ExtractionSettings, Images, print_path, provenance
from dino.features.extractor import Descriptor, extract
from dino.features.openvino_engine import openvino_engine
from dino.features.table import FeatureTable, ignored_files
from dino.files import UserError, atomic_csv, atomic_json, check_output, replacing
from dino.models.backbone import Backbone
from dino.runtime import pick_device, process_group
from dino.settings import validated
from dino.weights.load import load


def save(table: FeatureTable, path: str | Path) -> list[Path]:
    """Write a table: `F.npy` with `F.csv` beside it (path, label, class), or one `F.parquet`.

    Returns:
        The files written.

    Raises:
        UserError: for another ending than .npy or .parquet.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".parquet"):
        raise UserError(f"features go into F.npy or F.parquet, not {path.name}: change --out")
    labels = [None] * len(table) if table.labels is None else table.labels.tolist()
    known = table.classes
    names = [None if label is None or not known else known[label] for label in labels]
    if path.suffix == ".parquet":
        _save_parquet(path, table, labels, names)
        return [path]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, table.features.numpy())
    listing = path.with_suffix(".csv")
    atomic_csv(listing, ("path", "label", "class"), zip(table.paths, labels, names, strict=True))
    return [path, listing]


def _save_parquet(
    path: Path, table: FeatureTable, labels: list[int | None], names: list[str | None]
) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "a Parquet file needs pyarrow: pip install 'dino-ssl[parquet]', or choose a .npy file"
        ) from None
    flat = pa.array(table.features.numpy().reshape(-1))
    columns = {
        "path": pa.array(table.paths, pa.string()),
        "label": pa.array(labels, pa.int64()),
        "class": pa.array(names, pa.string()),
        "feature": pa.FixedSizeListArray.from_arrays(flat, table.features.shape[1]),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class FeatureSettings(ExtractionSettings):
    """Write the features of a folder of images to a file."""

    examples: ClassVar[dict[str, str]] = {"out": "features.npy"}

    data: Images
    """Images: a folder, a list (.txt, .csv, .tsv, .parquet), or demo."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """F.npy (with F.csv beside it) or F.parquet."""
    batch: Count = 64
    """Images at a time."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes the network: PyTorch, or OpenVINO on the CPU."""


def run(settings: FeatureSettings) -> FeatureTable:
    """`dino features`: extract, write, print the paths; F.json has the provenance.

    Raises:
        UserError: for weights or data that do not exist, or an unknown ending of the file.
    """
    settings = validated(settings)
    check_output(settings.out, (".npy", ".parquet"), siblings=(".csv", ".json"))
    device = pick_device(settings.device)
    if settings.engine == "openvino" and device.type != "cpu":
        raise UserError("--engine openvino computes on the CPU: add --device cpu")
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        source = open_source(settings.data, backbone.preprocessing.pixels)
        descriptor = None if settings.engine == "torch" else _by_openvino(backbone, settings)
        options = {"batch": settings.batch, **settings.extraction()}
        table = extract(backbone, source, descriptor, **options)
        if here.main:
            files = save(table, settings.out)
            about = {
                "images": len(table),
                "width": table.features.shape[1],
                "skipped": [error.path for error in table.skipped],
                "ignored_files": ignored_files(source),
                "classes": table.classes,
                **provenance(backbone, settings),
            }
            provenance_file = settings.out.with_suffix(".json")
            atomic_json(provenance_file, about)
            for path in (*files, provenance_file):
                print_path(path)
    return table


def _by_openvino(backbone: Backbone, settings: FeatureSettings) -> Descriptor:
    transform = backbone.preprocessing
    size = (transform.crop, transform.crop)
    engine = openvino_engine(backbone, size, settings.precision)
    return Descriptor("cls", transform, lambda _, images: engine(images), {"engine": "openvino"})
