"""`dino export`: trained weights for other programs, with a model card beside them.

safetensors        our own file: `dino.load` gives back the same network
official           the published code's names, in safetensors, since no pickle is written
timm               a folder for `timm.create_model`
transformers       a folder for `AutoModel` and `AutoImageProcessor`
onnx               a graph for onnxruntime and others
exported-program   a graph for `torch.export.load`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dino.files import UserError, atomic_write, check_output, naming
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.weights.export.files import (
    exported_program_file,
    official_file,
    onnx_file,
    own_file,
)
from dino.weights.export.folders import replacing_folder, timm_folder, transformers_folder
from dino.weights.export.graph import OPSET, Graph
from dino.weights.export.model_card import Contents, Words, card, origin, shareable
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
    """For the card: what the network was trained on."""
    licence: str = ""
    """For the card: the licence of the weights, for example apache-2.0."""


def run(settings: Export) -> list[Path]:
    """`dino export`: write the weights and their card, print the paths; see `write`."""
    check(settings)
    return write(load(settings.weights), settings)


def write(backbone: Backbone, settings: Export) -> list[Path]:
    """Write a network and its card, print the paths.

    Args:
        backbone: what `settings.weights` holds, possibly adapted while it was loaded.
        settings: how and where.

    Returns:
        The file or folder, and its card.

    Raises:
        UserError: if an extra is missing, a setting does not belong to the format, or `out` is
            something else already.
    """
    check(settings)
    came = origin(settings.weights, backbone)
    words = Words(settings.data_description, settings.licence)
    about = {
        "dialect": settings.format,
        "spec": backbone.spec,
        "preprocessing": backbone.preprocessing.to_dict(),
        "about": shareable(came.about),
        "sha256": came.sha256,
    }
    with Console(stderr=True).status(f"writing {settings.out}"):
        beside = _write(backbone, settings, about, lambda c: card(backbone, came, c, words))
    for written in (settings.out, beside):
        Console().print(f"{written}", highlight=False, soft_wrap=True)
    return [settings.out, beside]


def _write(
    backbone: Backbone,
    settings: Export,
    about: dict[str, Any],
    card_for: Callable[[Contents], str],
) -> Path:
    """Write the export and its card; where the card lies."""
    if settings.format in FOLDERS:
        side, _ = _size(backbone, settings)
        with naming(settings.out), replacing_folder(settings.out) as folder:
            contents = FOLDERS[settings.format](folder, backbone, side, about)
            (folder / "README.md").write_text(card_for(contents), encoding="utf-8")
        return settings.out / "README.md"
    card_path, existed = _card_of(settings.out), settings.out.exists()
    contents = _write_file(backbone, settings, about)
    try:
        atomic_write(card_path, card_for(contents))
    except BaseException:
        if not existed:  # without its card, the next call would refuse to replace it
            settings.out.unlink(missing_ok=True)
        raise
    return card_path


def _card_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.MODEL_CARD.md")


def _size(backbone: Backbone, settings: Export) -> tuple[int, int]:
    """Height and width of the images of the export."""
    sides = settings.size or (backbone.preprocessing.crop,)
    return sides[0], sides[-1]


def _write_file(backbone: Backbone, settings: Export, about: dict[str, Any]) -> Contents:
    if settings.format == "safetensors":
        return own_file(settings.out, backbone, about)
    if settings.format == "official":
        return official_file(settings.out, backbone, about)
    size = _size(backbone, settings)
    graph = Graph(backbone, size, settings.attention, settings.with_normalization)
    if settings.format == "onnx":
        return onnx_file(settings.out, graph, about, settings.opset)
    return exported_program_file(settings.out, graph, about)


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
    elif out.is_file() and not _card_of(out).exists():
        raise UserError(f"{out} exists and has no model card: choose another --out")
    check_output(out, folder=ending is None)
    most = {"onnx": 2, "exported-program": 2, "timm": 1, "transformers": 1}.get(settings.format, 0)
    if len(settings.size) > most:
        takes = "no --size: the file takes any" if most == 0 else "--size with one number"
        takes = "--size with one or two numbers" if most == 2 else takes
        raise UserError(f"--format {settings.format} takes {takes}")
    if any(side < 1 for side in settings.size):
        raise UserError(f"--size must be positive, not {settings.size}")
