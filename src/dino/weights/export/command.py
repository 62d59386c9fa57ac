"""`dino export`: trained weights for other programs, with a model card beside them.

safetensors        a file of dino: `dino.load` gives back the same network
official           the published code's names, in safetensors, since no pickle is written
timm               a folder for `timm.create_model`
transformers       a folder for `AutoModel` and `AutoImageProcessor`
onnx               a graph for onnxruntime and others
exported-program   a graph for `torch.export.load`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dino.files import UserError, atomic_write, check_output, naming, replacing
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.weights.export.files import (
    dino_file,
    exported_program_file,
    official_file,
    onnx_file,
)
from dino.weights.export.folders import replacing_folder, timm_folder, transformers_folder
from dino.weights.export.graph import OPSET, Graph
from dino.weights.export.model_card import FormatNotes, card, provenance, shareable
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

FOLDERS = {"timm": timm_folder, "transformers": transformers_folder}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write trained weights for timm, transformers, ONNX and others, with a model card."""

    weights: str
    """Run folder, file of weights or published name."""
    format: Format
    """safetensors, official, timm, transformers, onnx or exported-program."""
    out: Path
    """A folder for timm and transformers, else a file (.safetensors, .onnx, .pt2)."""
    size: tuple[int, ...] = ()
    """Pixels of the images: one number, or for graphs also height and width; by default what the
    preprocessing gives. The position embedding is resampled for it and stored."""
    attention: bool = False
    """Graphs only: also give the attention matrix of the last block."""
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
        settings: format and destination.

    Returns:
        The file or folder, and its card.

    Raises:
        UserError: if an extra is missing, a setting does not belong to the format, or `out` exists
            and is no export.
    """
    check(settings)
    source = provenance(settings.weights, backbone)
    about = {
        "dialect": settings.format,
        "spec": backbone.spec,
        "preprocessing": backbone.preprocessing.to_dict(),
        "about": shareable(source.about),
        "sha256": source.sha256,
    }

    def card_of(notes: FormatNotes) -> str:
        return card(backbone, source, notes, settings.data_description, settings.licence)

    with Console(stderr=True).status(f"writing {settings.out}"):
        if settings.format in FOLDERS:
            side, _ = _size(backbone, settings)
            written = settings.out / "README.md"
            with naming(settings.out), replacing_folder(settings.out) as folder:
                text = card_of(FOLDERS[settings.format](folder, backbone, side, about))
                (folder / written.name).write_text(text, encoding="utf-8")
        else:  # the card is in place first: a file without one is not replaced by the next call
            written = _card_path(settings.out)
            with replacing(settings.out) as temporary:
                notes = _write_file(temporary, backbone, settings, about)
                atomic_write(written, card_of(notes))
    for path in (settings.out, written):
        Console().print(f"{path}", highlight=False, soft_wrap=True)
    return [settings.out, written]


def _card_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.MODEL_CARD.md")


def _size(backbone: Backbone, settings: Export) -> tuple[int, int]:
    """Height and width of the images of the export."""
    sides = settings.size or (backbone.preprocessing.crop,)
    return sides[0], sides[-1]


def _write_file(
    path: Path, backbone: Backbone, settings: Export, about: dict[str, Any]
) -> FormatNotes:
    name = settings.out.name
    if settings.format == "safetensors":
        return dino_file(path, name, backbone, about)
    if settings.format == "official":
        return official_file(path, name, backbone, about)
    size = _size(backbone, settings)
    graph = Graph(backbone, size, settings.attention, settings.with_normalization)
    if settings.format == "onnx":
        return onnx_file(path, name, graph, about, settings.opset)
    return exported_program_file(path, name, graph, about)


def check(settings: Export) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        UserError: as `write` does.
    """
    out, ending = settings.out, SUFFIXES.get(settings.format)
    if ending is None:
        if out.suffix in SUFFIXES.values():
            raise UserError(
                f"--format {settings.format} writes a folder (weights, configuration, card): give "
                f"--out {out.with_suffix('')}"
            )
        for name in ("attention", "with_normalization"):
            if getattr(settings, name):
                raise UserError(f"--{name.replace('_', '-')} is for onnx and exported-program only")
    elif out.suffix != ending:
        raise UserError(f"--format {settings.format} writes a file: give --out {out}{ending}")
    elif out.is_file() and not _card_path(out).exists():
        raise UserError(f"{out} exists and has no model card: choose another --out")
    check_output(out, folder=ending is None)
    most = {"onnx": 2, "exported-program": 2, "timm": 1, "transformers": 1}.get(settings.format, 0)
    if len(settings.size) > most:
        takes = "no --size: the file takes any" if most == 0 else "--size with one number"
        takes = "--size with one or two numbers" if most == 2 else takes
        raise UserError(f"--format {settings.format} takes {takes}")
    if any(side < 1 for side in settings.size):
        raise UserError(f"--size must be positive, not {settings.size}")
