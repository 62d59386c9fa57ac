"""A network as a graph that needs none of this package: ONNX, and PyTorch's exported program.

Both hold one function of images of one fixed size, with named outputs and a free batch size. The
position embedding of that size is resampled beforehand and stored, so that no runtime has to
repeat PyTorch's bicubic interpolation (few do, and not alike).

Shapes: B batch, C channels, D width, h w the grid of patches, T tokens.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.files import UserError
from dino.models.backbone import Backbone

OPSET = 18
"""The ONNX operators that PyTorch's exporter writes natively; older ones are not supported."""

CLOSE = 1e-4
"""The largest difference between a written graph and the network, relative to the largest value.
Sums in another order move ResNet-50 by 1e-5."""

TWO_GIGABYTES = 2**31 - 2**24
"""The largest size of a single ONNX file, less 16 MiB for the graph itself."""


def fixed(backbone: Backbone, size: tuple[int, int]) -> Backbone:
    """A copy, on the CPU in fp32, whose position embedding is resampled for images of `size`.

    On images of that size it computes the same; it is not meant for others.

    Args:
        backbone: the network.
        size: height and width of the images in pixels.
    """
    network = copy.deepcopy(backbone).cpu().float().eval().requires_grad_(False)
    network.fix_size(*size)
    return network


class Graph(nn.Module):
    """The function to export: images of one size -> named outputs.

    The outputs are `cls` [B, D], `patches` [B, D, h, w] (convnets: the last map) and, if requested,
    `attention` [B, heads, T, T] of the last block. All but the attention after the final norm.

    Args:
        backbone: the network.
        size: height and width of the images in pixels.
        attention: whether to output the attention matrix.
        normalizes: whether to take uint8 pixels and apply mean and standard deviation itself.

    Raises:
        UserError: if the network has no attention, or the images hold no patch.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Backbone,
        size: tuple[int, int],
        attention: bool = False,
        normalizes: bool = False,
    ) -> None:
        super().__init__()
        if attention and not backbone.heads:
            arch = backbone.spec["arch"]
            raise UserError(f"{arch} has no CLS attention to export: leave out --attention")
        self.backbone = fixed(backbone, size)
        self.attention, self.normalizes = attention, normalizes
        self.shape = (backbone.channels, *size)
        mean = torch.tensor(backbone.preprocessing.mean)[:, None, None]
        std = torch.tensor(backbone.preprocessing.std)[:, None, None]
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Named outputs for images [B, C, H, W], normalised or, if `normalizes`, uint8."""
        if self.normalizes:
            images = images.float() * self.scale + self.shift
        features = self.backbone.features(images, attention=self.attention)
        named = {"cls": features.cls[0], "patches": features.patches[0]}
        return named if features.attention is None else {**named, "attention": features.attention}

    def names(self) -> list[str]:
        """The outputs in their order."""
        return ["cls", "patches", *(["attention"] if self.attention else [])]

    def example(self, batch: int) -> Tensor:
        """Random images of the graph's type and size, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, *self.shape)
        if self.normalizes:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(shape, generator=generator)

    def dynamic(self) -> tuple[dict[int, Any]]:
        """The free axis of the input, for PyTorch's exporters."""
        return ({0: torch.export.Dim("batch", min=1)},)


def write_onnx(graph: Graph, path: Path, about: dict[str, Any], opset: int = OPSET) -> None:
    """Write `graph` as one ONNX file, once onnxruntime computes with it what the network computes.

    Args:
        graph: the function to write.
        path: the file.
        about: JSON values for the file's metadata, under `dino`.
        opset: version of the ONNX operators, 18 or newer.

    Raises:
        UserError: if the extra `onnx` is missing, the opset is not supported, or the network is too
            large for one file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install 'dino-ssl[onnx]'") from None
    content = onnx_model(graph, about, opset)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    check_graph(graph, lambda images: session.run(None, {"images": images.numpy()}))
    path.write_bytes(content)


def onnx_model(graph: Graph, about: dict[str, Any], opset: int = OPSET) -> bytes:
    """The content of an ONNX file; see `write_onnx`, which also compares it with the network."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'dino-ssl[onnx]'") from None
    bytes_of_weights = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if bytes_of_weights > TWO_GIGABYTES:
        raise UserError(
            f"the weights take {bytes_of_weights / 2**30:.1f} GiB and one ONNX file holds 2: use "
            "--format exported-program"
        )
    if opset < OPSET:
        raise UserError(f"--opset {opset} is not supported: use {OPSET} or newer")
    program = torch.onnx.export(
        graph,
        (graph.example(2),),
        dynamo=True,
        input_names=["images"],
        output_names=graph.names(),
        dynamic_shapes=graph.dynamic(),
        opset_version=opset,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise UserError(f"this PyTorch writes opset {written}, not {opset}: change --opset")
    onnx.helper.set_model_props(model, {"dino": json.dumps(about)})
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def write_exported_program(graph: Graph, path: Path, about: dict[str, Any]) -> None:
    """Write `graph` as PyTorch's exported program (.pt2), checked as `write_onnx` does.

    The archive is a zip of raw tensors and JSON. PyTorch would add the example images as a pickle;
    they are left out, and a PyTorch that still writes one is refused.

    Args:
        graph: the function to write.
        path: the file.
        about: JSON values; `torch.export.load` hands them out under `dino.json`.

    Raises:
        UserError: if this version of PyTorch would write a pickle.
    """
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes=graph.dynamic())
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"dino.json": json.dumps(about)})
    if names := pickles(buffer):
        raise UserError(
            f"PyTorch {torch.__version__} puts pickles into exported programs ({names[0]}), which "
            "dino does not write: upgrade PyTorch, or use --format onnx"
        )
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    check_graph(graph, lambda images: [output.numpy() for output in loaded(images).values()])
    path.write_bytes(buffer.getvalue())


def pickles(archive: io.BytesIO | Path) -> list[str]:
    """The members of an exported program that are pickles: `torch.save` wraps them in a zip."""
    with zipfile.ZipFile(archive) as file:
        return [name for name in file.namelist() if file.read(name).startswith(b"PK\x03\x04")]


def check_graph(graph: Graph, run: Callable[[Tensor], Sequence[np.ndarray]]) -> None:
    """Compare `run` with `graph`, in fp32, for a batch of one and of three.

    Raises:
        RuntimeError: if their difference is more than `CLOSE`.
    """
    for batch in (1, 3):
        images = graph.example(batch)
        with torch.inference_mode():
            expected = {name: value.numpy() for name, value in graph(images).items()}
        for (name, value), output in zip(expected.items(), run(images), strict=True):
            if output.shape != value.shape:
                raise RuntimeError(f"{name} became {output.shape}, not {value.shape}")
            difference = np.abs(output - value).max() / np.abs(value).max()
            if not difference <= CLOSE:
                raise RuntimeError(
                    f"{name} of the graph differs from the network by {difference:.1e}: it was not "
                    "written"
                )
