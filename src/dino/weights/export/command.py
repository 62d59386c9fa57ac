"""`dino export`: trained weights for other programs, with a model card beside them.

safetensors        a file of dino: `dino.load` reads the same network
official           the published code's names, in safetensors, since no pickle is written
timm               a folder for `timm.create_model`
transformers       a folder for `AutoModel` and `AutoImageProcessor`
onnx               a graph for onnxruntime and others
exported-program   a graph for `torch.export.load`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import tyro

from dino.files import UserError, atomic_write, check_output, naming, replacing
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.weights.export.files import dino_file, graph_file, official_file
from dino.weights.export.folders import (
    is_export,
    replacing_folder,
    timm_folder,
    transformers_folder,
)
from dino.weights.export.graph import OPSET, Graph
from dino.weights.export.model_card import card, provenance
from dino.weights.load import load

Format: TypeAlias = Literal[
    "safetensors", "official", "timm", "transformers", "onnx", "exported-program"
]

SUFFIXES = {
    "safetensors": ".safetensors",
    "official": ".safetensors",
    "onnx": ".onnx",
    "exported-program": ".pt2",
}
"""Endings of the formats that are a single file; the others are folders."""

GRAPHS = ("onnx", "exported-program")


def format_for(values: Mapping[str, str]) -> str:
    """A format that suits --out, for messages."""
    out = values.get("out", "")
    return next((name for name, ending in SUFFIXES.items() if out.endswith(ending)), "timm")


def out_for(values: Mapping[str, str]) -> str:
    """A place that suits --format or --to, for messages."""
    name = values.get("format") or values.get("to") or "timm"
    return f"exports/{name}{SUFFIXES.get(name, '')}"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write trained weights for timm, transformers, ONNX and others, with a model card."""

    examples: ClassVar[dict[str, Any]] = {"format": format_for, "out": out_for}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    format: Format
    """safetensors, official, timm, transformers, onnx or exported-program."""
    out: Path
    """A folder for timm and transformers, else a file (.safetensors, .onnx, .pt2)."""
    size: tuple[int, ...] = ()
    """Pixels of the images: one number, or for graphs also height and width; by default what the
    preprocessing gives. The position embedding is resampled for it and stored."""
    attention: bool = False
    """Graphs only: also output the attention matrix of the last block."""
    with_normalization: bool = False
    """Graphs only: take uint8 pixels and apply mean and standard deviation inside."""
    opset: int = OPSET
    """Version of the ONNX operators."""
    data_description: str = ""
    """For the card: the images that the network was trained on."""
    licence: str = ""
    """For the card: the licence of the weights, for example apache-2.0."""


def run(settings: Export) -> list[Path]:
    """`dino export`: write the weights and their card, print the paths; see `write`."""
    check(settings)
    return write(load(settings.weights), settings)


def write(backbone: Backbone, settings: Export) -> list[Path]:
    """Write a network and its card, print the paths.

    Args:
        backbone: the network of `settings.weights`, possibly adapted while it was loaded.
        settings: format and destination, which `check` has accepted.

    Returns:
        The file or folder, and its card.

    Raises:
        UserError: if an extra is missing, or the format has no such network.
    """
    out, format = settings.out, settings.format
    source = provenance(settings.weights, backbone)
    about = {
        "dialect": format,
        "spec": backbone.spec,
        "preprocessing": backbone.preprocessing.to_dict(),
        "about": source.about,
        "sha256": source.sha256,
    }
    sides = settings.size or (backbone.preprocessing.crop,)
    texts = (settings.data_description, settings.licence)
    with Console(stderr=True).status(f"writing {out}"):
        if format in SUFFIXES:  # the card first: a file without one is not replaced by the next run
            card_path = _card_path(out)
            with replacing(out) as file:
                if format in GRAPHS:
                    size = (sides[0], sides[-1])
                    graph = Graph(backbone, size, settings.attention, settings.with_normalization)
                    opset = settings.opset if format == "onnx" else None
                    notes = graph_file(file, out.name, graph, about, opset)
                else:
                    write_file = official_file if format == "official" else dino_file
                    notes = write_file(file, out.name, backbone, about)
                atomic_write(card_path, card(backbone, source, notes, *texts))
        else:
            card_path = out / "README.md"
            write_folder = timm_folder if format == "timm" else transformers_folder
            with naming(out), replacing_folder(out) as folder:
                notes = write_folder(folder, backbone, sides[0], about)
                atomic_write(folder / "README.md", card(backbone, source, notes, *texts))
    for path in (out, card_path):
        Console().print(f"{path}", soft_wrap=True)
    return [out, card_path]


def _card_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.MODEL_CARD.md")


def check(settings: Export) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        UserError: if a setting does not belong to the format, or `out` cannot be written or exists
            and is no export.
    """
    out, format, ending = settings.out, settings.format, SUFFIXES.get(settings.format, "")
    if not ending and out.suffix in SUFFIXES.values():
        raise UserError(f"--format {format} writes a folder: give --out {out.with_suffix('')}")
    if ending and out.suffix != ending:
        raise UserError(f"--format {format} writes a file: give --out {out}{ending}")
    check_output(out, folder=not ending)
    if ending and out.is_file() and not _card_path(out).exists():
        raise UserError(f"{out} exists and has no model card: choose another --out")
    if not ending and not is_export(out):
        raise UserError(f"{out} exists and is no export of dino: choose another --out")
    if format not in GRAPHS:
        for name in ("attention", "with_normalization"):
            if getattr(settings, name):
                raise UserError(f"--{name.replace('_', '-')} is for onnx and exported-program only")
    most = 2 if format in GRAPHS else 0 if ending else 1
    if len(settings.size) > most:
        takes = ("no --size: the file takes any", "--size with one number", "at most two sizes")
        raise UserError(f"--format {format} takes {takes[most]}")
    if any(side < 1 for side in settings.size):
        raise UserError(f"--size must be positive, not {settings.size}")
