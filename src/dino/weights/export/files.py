"""Exports that are a single file, each with the notes for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dino.models.backbone import Backbone
from dino.weights.export.folders import save_tensors, sized
from dino.weights.export.graph import Graph, write_exported_program, write_onnx
from dino.weights.export.model_card import FormatNotes
from dino.weights.key_maps import from_dino
from dino.weights.load import save

DINO_USE = """
import dino

backbone = dino.load({file})
features = backbone.embed(["picture.jpg"])  # [1, {embed_dim}], preprocessing included
"""

PICTURE = """
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

transform = v2.Compose(
    [
        {steps},
    ]
)
images = transform(Image.open("picture.jpg").convert("RGB"))[None]  # any number of them
"""

NO_PICTURE = """
import torch

images = torch.zeros({shape}, dtype=torch.{dtype})  # your images
"""

ONNX_USE = """
import onnxruntime

session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])
{names} = session.run(None, {{"images": images.numpy()}})
"""

PROGRAM_USE = """
backbone = torch.export.load({file}).module()
outputs = backbone(images)  # a dictionary: {names}
"""


def dino_file(path: Path, name: str, backbone: Backbone, about: dict[str, Any]) -> FormatNotes:
    """Write a safetensors file of dino, from which `dino.load` builds the same network."""
    save(backbone, path, about["about"])
    return FormatNotes("a file of dino", _dino_use(name, backbone), backbone.preprocessing)


def official_file(path: Path, name: str, backbone: Backbone, about: dict[str, Any]) -> FormatNotes:
    """Write a flat state dict under the published code's names, as safetensors.

    Raises:
        UserError: for a network that the published code does not have.
    """
    save_tensors(path, from_dino(backbone.state_dict(), "official", backbone.spec), about)
    notes = ("For the published code: `load_state_dict(safetensors.torch.load_file(...))`.",)
    title = "a file with the names of the published code"
    return FormatNotes(title, _dino_use(name, backbone), backbone.preprocessing, notes)


def _dino_use(name: str, backbone: Backbone) -> str:
    return DINO_USE.format(file=json.dumps(name), embed_dim=backbone.embed_dim)


def graph_file(
    path: Path, name: str, graph: Graph, about: dict[str, Any], opset: int | None
) -> FormatNotes:
    """Write ONNX with the operators of `opset`, or for None PyTorch's exported program."""
    channels, height, width = graph.shape
    pixels = "uint8" if graph.normalizes else "normalised"
    shape = {"channels": channels, "height": height, "width": width}
    about = {**about, "input": {**shape, "pixels": pixels}}
    if opset is None:
        write_exported_program(graph, path, about)
        title, usage = "a PyTorch exported program", PROGRAM_USE
    else:
        write_onnx(graph, path, about, opset)
        title, usage = "an ONNX graph", ONNX_USE
    usage = usage.format(file=json.dumps(name), names=", ".join(graph.names()))
    notes = (
        f"Takes any number of images of {height} x {width} px, {pixels}.",
        f"Outputs: {', '.join(f'`{name}`' for name in graph.names())}.",
    )
    preprocessing = sized(graph.backbone.preprocessing, min(height, width))
    return FormatNotes(title, _images(graph) + usage, preprocessing, notes)


def _images(graph: Graph) -> str:
    """Code from a picture to the graph's input."""
    channels, height, width = graph.shape
    if channels != 3:
        dtype = "uint8" if graph.normalizes else "float32"
        return NO_PICTURE.format(shape=(1, *graph.shape), dtype=dtype)
    preprocessing = sized(graph.backbone.preprocessing, height)
    side = preprocessing.resize
    size = [height, width] if height != width else [side, side] if preprocessing.squash else side
    steps = [
        f"v2.Resize({size}, InterpolationMode.{preprocessing.interpolation.upper()})",
        f"v2.CenterCrop({[height, width]})",
        "v2.PILToTensor()",
    ]
    if not graph.normalizes:
        mean, std = list(preprocessing.mean), list(preprocessing.std)
        steps += ["v2.ToDtype(torch.float32, scale=True)", f"v2.Normalize({mean}, {std})"]
    return PICTURE.format(steps=",\n        ".join(steps))
