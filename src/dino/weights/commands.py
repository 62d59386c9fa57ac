"""`dino weights`: what there is, what a file holds, downloads, conversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from tyro.conf import Positional

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, atomic_json, check_output
from dino.models.create import create
from dino.models.position_embedding import Position
from dino.progress import Console
from dino.weights.checkpoint import Part, Parts, WhichNetwork
from dino.weights.download import cached_path, fetch, source_url
from dino.weights.export.command import Export, write
from dino.weights.files import file_hash
from dino.weights.load import load, misfits, read_checkpoint
from dino.weights.published import CATALOGUE, LICENCE, LOADABLE, Kind, Published


# ------------------------------------------------------------------------------------ list
@dataclass(frozen=True, kw_only=True)
class List:
    """Show the published weights: what they are worth, and what of them is here."""

    all: bool = False
    """Show every file with its URL instead: also classifiers, graphs, arguments and logs."""
    json: Path | None = None
    """Also write it as JSON here, with URLs and places in the cache."""


PREPROCESSING = (
    "All expect the shorter side at 256 px (bicubic), the central 224 px, mean and deviation of "
    "ImageNet."
)


def run_list(settings: List) -> list[dict[str, Any]]:
    """`dino weights list`: one table of the catalogue; * marks what is in the cache."""
    files = list(CATALOGUE.values())
    rows = [_row(published) for published in files]
    if settings.json is not None:
        atomic_json(settings.json, {"licence": LICENCE, "files": rows})
    if settings.all:
        for published in files:
            line = f"{published.name + _here(published):32} {source_url(published)}"
            Console().print(line, highlight=False, soft_wrap=True)
    else:
        Console().print(_models(files))
    return rows


def _models(files: Sequence[Published]) -> Table:
    notes = [f"{published.name}: {published.note}." for published in files if published.note]
    table = Table(
        title=f"published weights ({LICENCE}); top-1 % on ImageNet, * is in the cache",
        caption="\n".join([PREPROCESSING, *notes]),
        caption_justify="left",
    )
    for title in ("name", "architecture"):
        table.add_column(title, no_wrap=True)
    for title in ("M", "k-NN", "linear"):
        table.add_column(title, justify="right")
    table.add_column("also, as NAME_...")
    for published in files:
        if not _is_model(published):
            continue
        also = [CATALOGUE.get(f"{published.name}_{kind}") for kind in SIBLINGS]
        table.add_row(
            published.name + _here(published),
            published.architecture,
            str(published.parameters),
            _number(published.knn),
            _number(published.linear),
            ", ".join(other.kind + _here(other) for other in also if other is not None),
        )
    return table


SIBLINGS: tuple[Kind, ...] = ("full", "linear", "onnx", "args", "log", "linear-log")


def _is_model(published: Published) -> bool:
    """Whether it is a model of its own, not the full checkpoint of another."""
    name = published.name
    sibling = name.endswith("_full") and name.removesuffix("_full") in CATALOGUE
    return published.kind in LOADABLE and not sibling


def _here(published: Published) -> str:
    return " *" if cached_path(published).exists() else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _row(published: Published) -> dict[str, Any]:
    path = cached_path(published)
    return {
        "name": published.name,
        "kind": published.kind,
        "architecture": published.spec,
        "preprocessing": Preprocessing().to_dict() if published.kind in LOADABLE else None,
        "parameters_millions": published.parameters,
        "knn": published.knn,
        "linear": published.linear,
        "note": published.note,
        "url": source_url(published),
        "sha256": published.sha256,
        "cached": str(path) if path.exists() else None,
    }


# ------------------------------------------------------------------------------------ fetch
@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download published files into the cache; those that are there are checked."""

    names: Positional[tuple[str, ...]]
    """Names that `dino weights list --all` shows."""


def run_fetch(settings: Fetch) -> list[Path]:
    """`dino weights fetch`: download, print path and SHA-256.

    Raises:
        UserError: for an unknown name, or if a file cannot be had whole.
    """
    unknown = [name for name in settings.names if name not in CATALOGUE]
    if unknown or not settings.names:
        what = f"there is no published {unknown[0]!r}" if unknown else "no name was given"
        raise UserError(f"{what}: `dino weights list --all` shows the names")
    paths = [fetch(CATALOGUE[name]) for name in settings.names]
    for path in paths:
        Console().print(f"{path}  sha256 {file_hash(path)}", highlight=False, soft_wrap=True)
    return paths


# ------------------------------------------------------------------------------------ inspect
@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what weights are: dialect, architecture, head, preprocessing, and whether they fit."""

    weights: Positional[str]
    """Run folder, file or folder of weights, or published name."""
    heads: int | None = None
    """Attention heads of a ViT whose file does not tell."""
    json: Path | None = None
    """Also write it as JSON here."""


def run_inspect(settings: Inspect) -> dict[str, Any]:
    """`dino weights inspect`: one table; keys that would not fit are all listed.

    Raises:
        UserError: if the weights cannot be read at all.
    """
    if settings.json is not None:
        check_output(settings.json, option="--json")
    found = inspect(read_checkpoint(settings.weights, heads=settings.heads))
    if settings.json is not None:
        atomic_json(settings.json, found)
    table = Table(title=str(settings.weights), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name, "\n".join(text) if isinstance(text, list) else str(text))
    Console().print(table)
    return found


def inspect(parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds, in JSON-able words; `fits` says which keys would not fit."""
    with torch.device("meta"):
        backbone = create(**parts.spec)
    networks = {"teacher": parts.teacher, "student": parts.student}
    present = {name: part for name, part in networks.items() if part is not None}
    origin = parts.origin("teacher" if parts.teacher is not None else "student")
    described: dict[str, Any] = {
        **{key: value for key, value in origin.items() if key != "network"},
        "networks": list(present),
        "architecture": parts.spec,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        **backbone.describe(),
    }
    return {
        **described,
        "head": parts.head_options or "none",
        "center": "none" if parts.center is None else f"of {len(parts.center)} prototypes",
        "preprocessing": parts.preprocessing.to_dict(),
        "fits": [line for name, part in present.items() for line in _fit(name, part, backbone)],
        "notes": list(parts.notes),
    }


def _fit(name: str, part: Part, backbone: Any) -> list[str]:
    found = misfits(backbone, part.backbone)
    if not found:
        return [f"{name}: every key and shape"]
    return [f"{name}: {kind} {key}" for kind, keys in found.items() for key in keys]


# ------------------------------------------------------------------------------------ convert
@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write weights in another dialect, adapted if asked: `dino export` for weights of others."""

    weights: Positional[str]
    """Run folder, file or folder of weights, or published name."""
    to: Literal["safetensors", "official", "timm", "transformers"]
    """safetensors (dino's own), official, timm or transformers."""
    out: Path
    """A folder for timm and transformers, else a file (.safetensors)."""
    network: WhichNetwork = "teacher"
    """The teacher, or the student of a full checkpoint."""
    position: Position | None = None
    """Another way to resample the position embedding: reference or exact (ViTs only)."""
    channels: int | None = None
    """Adapt the first layer to images of so many channels."""
    heads: int | None = None
    """Attention heads of a ViT whose file does not tell."""


def run_convert(settings: Convert) -> list[Path]:
    """`dino weights convert`: load, write with a model card, print the paths.

    Raises:
        UserError: if the weights cannot be loaded, or the dialect has no such network.
    """
    export = Export(weights=settings.weights, format=settings.to, out=settings.out)
    backbone = load(
        settings.weights,
        network=settings.network,
        position=settings.position,
        channels=settings.channels,
        heads=settings.heads,
    )
    return write(backbone, export)
