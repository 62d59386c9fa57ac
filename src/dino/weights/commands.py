"""`dino weights`: list, fetch, inspect and convert weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from rich.table import Column, Table

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, atomic_json, check_output
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.models.position_embedding import Position
from dino.progress import Console
from dino.weights.checkpoint import Checkpoint, NetworkState
from dino.weights.download import cached_path, fetch, source_url
from dino.weights.export.command import Export, check, format_for, out_for, write
from dino.weights.files import file_hash
from dino.weights.foreign_config import DINOV3
from dino.weights.load import check_state_dict, load, mismatches, read_checkpoint
from dino.weights.published import CATALOGUE, COLLECTIONS, LOADABLE, Published, advice


# ------------------------------------------------------------------------------------ list
@dataclass(frozen=True, kw_only=True)
class List:
    """Show the published weights: architectures, accuracies, and which are in the cache."""

    all: bool = False
    """Show every file with its URL instead: also classifiers, graphs, arguments and logs."""
    json: Path | None = None
    """Also write it to this JSON file, with URLs and paths in the cache."""


Weights = Annotated[str, tyro.conf.arg(metavar="RUN")]
PREPROCESSING = (
    "DINO's and DINOv2's expect the shorter side at 256 px (bicubic), the central 224 px; DINOv3's "
    "both sides at 256 px (bilinear); mean and deviation of ImageNet."
)
SIBLINGS = ("full", "linear", "onnx", "args", "log", "linear-log")


def run_list(settings: List) -> list[dict[str, Any]]:
    """`dino weights list`: one table of the catalogue; * marks what is in the cache."""
    rows = [_row(published) for published in CATALOGUE.values()]
    if settings.json is not None:
        licences = {name: collection.licence for name, collection in COLLECTIONS.items()}
        atomic_json(settings.json, {"licences": licences, "files": rows})
    if settings.all:
        for published in CATALOGUE.values():
            line = f"{published.name + _mark(published):32} {source_url(published)}"
            Console().print(line, soft_wrap=True)
    else:
        Console().print(_models())
    return rows


def _models() -> Table:
    others = ", ".join(f"NAME_{kind}" for kind in SIBLINGS)
    notes = [f"Where there are accuracies also {others} (not all are published): --all lists them."]
    notes += [f"{file.name}: {file.note}." for file in CATALOGUE.values() if file.note]
    siblings = {f"{name}_{kind}" for name in CATALOGUE for kind in SIBLINGS}
    table = Table(
        Column("name", no_wrap=True),
        Column("architecture", overflow="fold"),
        *(Column(title, justify="right", no_wrap=True) for title in ("M", "k-NN", "linear")),
        title=f"published weights ({_licences()}); top-1 % on ImageNet, * is in the cache",
        caption="\n".join([PREPROCESSING, *notes]),
        caption_justify="left",
    )
    for published in CATALOGUE.values():
        if published.kind in LOADABLE and published.name not in siblings:
            accuracies = (published.knn, published.linear)
            table.add_row(
                published.name + _mark(published),
                published.architecture,
                str(published.parameters),
                *("" if top1 is None else f"{top1:.1f}" for top1 in accuracies),
            )
    return table


def _licences() -> str:
    return ", ".join(f"{name}: {one.licence}" for name, one in COLLECTIONS.items())


def _mark(published: Published) -> str:
    return " *" if cached_path(published).exists() else ""


def _preprocessing(published: Published) -> dict[str, Any] | None:
    if published.kind not in LOADABLE:
        return None
    usual = DINOV3 if published.collection == "dinov3" else Preprocessing()
    return (published.preprocessing or usual).to_dict()


def _row(published: Published) -> dict[str, Any]:
    path = cached_path(published)
    return {
        "name": published.name,
        "kind": published.kind,
        "architecture": published.spec,
        "preprocessing": _preprocessing(published),
        "licence": published.origin.licence,
        "parameters_millions": published.parameters,
        "knn": published.knn,
        "linear": published.linear,
        "note": published.note,
        "url": source_url(published),
        "cached": str(path) if path.exists() else None,
    }


# ------------------------------------------------------------------------------------ fetch
@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download published files into the cache; cached files are checked."""

    examples: ClassVar[dict[str, str]] = {"weights": "dino_vits16"}

    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
    """Names that `dino weights list --all` shows."""


def run_fetch(settings: Fetch) -> list[Path]:
    """`dino weights fetch`: download the files and print each path with its SHA-256.

    Raises:
        UserError: for an unknown name, or if a download fails.
    """
    unknown = [name for name in settings.weights if name not in CATALOGUE]
    if unknown or not settings.weights:
        what = f"there is no published {unknown[0]!r}" if unknown else "no name was given"
        raise UserError(f"{what}: {advice(unknown[0] if unknown else '', list_all=True)}")
    paths = [fetch(CATALOGUE[name]) for name in settings.weights]
    for path in paths:
        Console().print(f"{path}  sha256 {file_hash(path)}", soft_wrap=True)
    return paths


# ------------------------------------------------------------------------------------ inspect
@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show dialect, architecture, head and preprocessing of weights, and whether they fit."""

    weights: Weights
    """Run folder, file or folder of weights, or published name."""
    network: str = "teacher"
    """One of several networks in a file, by its key (such as model_ema)."""
    heads: int | None = None
    """Attention heads of a ViT whose file does not state them."""
    json: Path | None = None
    """Also write it to this JSON file."""


def run_inspect(settings: Inspect) -> dict[str, Any]:
    """`dino weights inspect`: one table; keys that would not fit are all listed.

    Raises:
        UserError: if the weights cannot be read, or, after the table, if they do not fit.
    """
    if settings.json is not None:
        check_output(settings.json, option="--json")
    checkpoint = read_checkpoint(settings.weights, heads=settings.heads, network=settings.network)
    with torch.device("meta"):
        backbone = create(**checkpoint.spec)
    found = inspect(checkpoint, backbone)
    table = Table(
        Column(style="bold", no_wrap=True),
        Column(overflow="fold"),
        title=settings.weights,
        show_header=False,
    )
    for name, value in found.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name, "\n".join(text) if isinstance(text, list) else str(text))
    Console().print(table)
    if settings.json is not None:
        atomic_json(settings.json, found)
    for state in _states(checkpoint).values():
        check_state_dict(backbone, state.backbone, checkpoint.path)
    return found


def _states(checkpoint: Checkpoint) -> dict[str, NetworkState]:
    networks = {"teacher": checkpoint.teacher, "student": checkpoint.student}
    return {name: state for name, state in networks.items() if state is not None}


def inspect(checkpoint: Checkpoint, backbone: Backbone) -> dict[str, Any]:
    """What a checkpoint holds, as JSON values; `fits` lists the keys that do not fit `backbone`."""
    states = _states(checkpoint)
    origin, center = checkpoint.origin(next(iter(states))), checkpoint.center
    fits = []
    for name, state in states.items():
        found = mismatches(backbone, state.backbone)
        misfits = [f"{kind} {key}" for kind, keys in found.items() for key in keys]
        fits += [f"{name}: {line}" for line in misfits or ["every key and shape"]]
    return {
        **{key: value for key, value in origin.items() if key != "network"},
        "networks": list(states),
        "architecture": checkpoint.spec,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        **backbone.describe(),
        "head": checkpoint.head_options or "none",
        "center": "none" if center is None else f"of {len(center)} prototypes",
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "fits": fits,
        "notes": list(checkpoint.notes),
    }


# ------------------------------------------------------------------------------------ convert
@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write weights in another library's layout, for other channels or from a full checkpoint."""

    examples: ClassVar[dict[str, Any]] = {"to": format_for, "out": out_for}

    weights: Weights
    """Run folder, file or folder of weights, or published name."""
    to: Literal["safetensors", "official", "timm", "transformers"]
    """safetensors (dino's own), official, timm or transformers."""
    out: Path
    """A folder for timm and transformers, else a file (.safetensors)."""
    network: str = "teacher"
    """The teacher, the student of a full checkpoint, or another network of a file by its key."""
    position: Position | None = None
    """Another way to resample the position embedding: reference, exact or antialias (ViTs only)."""
    channels: int | None = None
    """Adapt the first layer to images of so many channels."""
    heads: int | None = None
    """Attention heads of a ViT whose file does not state them."""


def run_convert(settings: Convert) -> list[Path]:
    """`dino weights convert`: load, write with a model card, print the paths.

    Raises:
        UserError: if the weights cannot be loaded, or the dialect has no such network.
    """
    export = Export(weights=settings.weights, format=settings.to, out=settings.out)
    check(export)
    backbone = load(
        settings.weights,
        network=settings.network,
        position=settings.position,
        channels=settings.channels,
        heads=settings.heads,
    )
    return write(backbone, export)
