"""Exports that are a single file, each with the notes for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone
from dino.weights.export.folders import save_tensors, sized
from dino.weights.export.graph import CLOSE, Graph, write_exported_program, write_onnx
from dino.weights.export.model_card import FormatNotes
from dino.weights.key_maps import from_dino
from dino.weights.load import save

OWN_USE = """
import dino

backbone = dino.load({file})
features = backbone.embed(["picture.jpg"])  # [1, {width}], preprocessing included
"""

OFFICIAL_USE = """
import dino

backbone = dino.load({file})  # or load_state_dict(safetensors.torch.load_file({file}))
features = backbone.embed(["picture.jpg"])  # [1, {width}], preprocessing included
"""

PICTURE = """
{library}import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

transform = v2.Compose(
    [
        v2.Resize({resize}, InterpolationMode.{mode}),
        v2.CenterCrop({crop}),
        v2.PILToTensor(),{last}
    ]
)
images = transform(Image.open("picture.jpg").convert("RGB"))[None]  # any number of them
"""
NORMALISE = """
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize({mean}, {std}),"""

NO_PICTURE = """
{library}import torch

images = torch.zeros(1, {channels}, {height}, {width}, dtype=torch.{dtype})  # your images
"""

ONNX_USE = """
session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])
{outputs} = session.run([{names}], {{"images": images.numpy()}})
"""

PROGRAM_USE = """
backbone = torch.export.load({file}).module()
found = backbone(images)  # a dictionary: {names}
"""


def dino_file(path: Path, name: str, backbone: Backbone, about: dict[str, Any]) -> FormatNotes:
    """Write a safetensors file of dino, from which `dino.load` builds the same network."""
    save(backbone, path, about["about"])
    usage = OWN_USE.format(file=json.dumps(name), width=backbone.embed_dim)
    return FormatNotes("a file of dino", usage, backbone.preprocessing)


def official_file(path: Path, name: str, backbone: Backbone, about: dict[str, Any]) -> FormatNotes:
    """Write a flat state dict under the published code's names, as safetensors.

    Raises:
        UserError: for a network that the published code does not have.
    """
    named = from_dino(backbone.state_dict(), "official", backbone.spec)
    save_tensors(path, named, about)
    usage = OFFICIAL_USE.format(file=json.dumps(name), width=backbone.embed_dim)
    notes = (
        "The published code keeps its weights in `.pth` files, which are pickles. This is "
        "safetensors with the same names, because reading it runs no code.",
    )
    title = "a file with the names of the published code"
    return FormatNotes(title, usage, backbone.preprocessing, notes)


# ------------------------------------------------------------------------------------ graphs
def onnx_file(
    path: Path, name: str, graph: Graph, about: dict[str, Any], opset: int
) -> FormatNotes:
    """Write ONNX; see `write_onnx`."""
    write_onnx(graph, path, {**about, "input": _input(graph)}, opset)
    return _notes("an ONNX graph", ONNX_USE, name, graph)


def exported_program_file(
    path: Path, name: str, graph: Graph, about: dict[str, Any]
) -> FormatNotes:
    """Write PyTorch's exported program; see `write_exported_program`."""
    write_exported_program(graph, path, {**about, "input": _input(graph)})
    return _notes("a PyTorch exported program", PROGRAM_USE, name, graph)


def _input(graph: Graph) -> dict[str, Any]:
    channels, height, width = graph.shape
    pixels = "uint8" if graph.normalizes else "normalised"
    return {"channels": channels, "height": height, "width": width, "pixels": pixels}


def _notes(title: str, usage: str, name: str, graph: Graph) -> FormatNotes:
    _, height, width = graph.shape
    names = graph.names()
    run = usage.format(
        file=json.dumps(name),
        names=", ".join(f'"{output}"' for output in names),
        outputs=", ".join(names),
    )
    pixels = "uint8 pixels, 0 to 255" if graph.normalizes else "normalised"
    notes: tuple[str, ...] = (
        f"Takes any number of images of {height} x {width} px, {pixels}.",
        "`cls` is the feature, `patches` are the features of the patches on their grid"
        + (", `attention` is the last block's, after the softmax." if graph.attention else "."),
        f"Checked when written: it agrees with PyTorch within {CLOSE:g} of the largest value.",
    )
    if height != width:
        notes += (f"Images are resized to {height} x {width} px whatever their aspect ratio.",)
    preprocessing = sized(graph.backbone.preprocessing, min(height, width))
    library = "import onnxruntime\n" if "onnxruntime" in usage else ""
    return FormatNotes(title, _images(graph, preprocessing, library) + run, preprocessing, notes)


def _images(graph: Graph, preprocessing: Preprocessing, library: str) -> str:
    """Code from a picture to the graph's input; it also imports what the rest needs."""
    channels, height, width = graph.shape
    if channels != 3:
        dtype = "uint8" if graph.normalizes else "float32"
        return NO_PICTURE.format(
            library=library, channels=channels, height=height, width=width, dtype=dtype
        )
    side = preprocessing.resize
    resize = [side, side] if preprocessing.squash else side
    normalise = NORMALISE.format(mean=list(preprocessing.mean), std=list(preprocessing.std))
    return PICTURE.format(
        library=library,
        resize=resize if height == width else [height, width],
        mode=preprocessing.interpolation.upper(),
        crop=[height, width],
        last="" if graph.normalizes else normalise,
    )
