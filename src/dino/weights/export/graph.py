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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.files import UserError, replacing
from dino.models.backbone import Backbone

OPSET = 18
"""The ONNX operators that PyTorch's exporter writes natively; older ones are not supported."""

CLOSE = 1e-4
"""The largest difference between a written graph and the network, relative to the largest value.
Sums in another order move ResNet-50 by 1e-5."""

TWO_GIGABYTES = 2**31 - 2**24
"""What a single ONNX file can hold, less some room for the graph itself."""


def fixed(backbone: Backbone, size: tuple[int, int]) -> Backbone:
    """A copy, on the CPU in fp32, whose position embedding is the one for images of `size`.

    On images of that size it computes the same; others are not meant for it. Networks without a
    learned position embedding of dino's ViT are copied as they are.

    Args:
        backbone: the network.
        size: height and width of the images in pixels.
    """
    twin = copy.deepcopy(backbone).cpu().float().eval().requires_grad_(False)
    twin.fix_size(*size)
    return twin


class Graph(nn.Module):
    """What is written: images of one size -> named outputs.

    The outputs are `cls` [B, D], `patches` [B, D, h, w] (convnets: the last map) and, if requested,
    `attention` [B, heads, T, T] of the last block. All but the attention after the final norm.

    Args:
        backbone: the network.
        size: height and width of the images in pixels.
        attention: whether to give the attention matrix.
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
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
        )
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Named outputs for images [B, C, H, W], normalised or, if `normalizes`, uint8."""
        if self.normalizes:
            images = images.float() * self.scale + self.shift
        found = self.backbone.features(images, attention=self.attention)
        named = {"cls": found.cls[0], "patches": found.patches[0]}
        return named if found.attention is None else {**named, "attention": found.attention}

    def names(self) -> list[str]:
        """The outputs in their order."""
        return ["cls", "patches", *(["attention"] if self.attention else [])]

    def example(self, batch: int) -> Tensor:
        """Some images such as the graph takes, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, *self.shape)
        if self.normalizes:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(shape, generator=generator)

    def dynamic(self) -> tuple[dict[int, Any]]:
        """The free axis of the input, for PyTorch's exporters."""
        return ({0: torch.export.Dim("batch", min=1)},)


def write_onnx(graph: Graph, path: Path, about: dict[str, Any], opset: int = OPSET) -> float:
    """Write `graph` as one ONNX file, and run it against the network before it gets its name.

    Args:
        graph: what to write.
        path: the file.
        about: JSON values; they go into the file's metadata under `dino`.
        opset: version of the ONNX operators, 18 or newer.

    Returns:
        The largest difference to the network's outputs, relative to their largest value.

    Raises:
        UserError: if the extra `onnx` is missing, the opset is not supported, or the network is too
            large for one file.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install 'dino-ssl[onnx]'") from None
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
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> dict[str, np.ndarray]:
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))

        return _check(graph, run)


def write_exported_program(graph: Graph, path: Path, about: dict[str, Any]) -> float:
    """Write `graph` as PyTorch's exported program (.pt2), and check it as `write_onnx` does.

    The archive is a zip of raw tensors and JSON. PyTorch would add the example images as a pickle;
    they are left out, and a PyTorch that still writes one is refused.

    Args:
        graph: what to write.
        path: the file.
        about: JSON values; `torch.export.load` hands them out under `dino.json`.

    Returns:
        The largest difference to the network's outputs, relative to their largest value.

    Raises:
        UserError: if this version of PyTorch would write a pickle.
    """
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes=graph.dynamic())
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"dino.json": json.dumps(about)})
    if found := pickles(buffer):
        raise UserError(
            f"PyTorch {torch.__version__} puts pickles into exported programs ({found[0]}), which "
            "dino does not write: upgrade PyTorch, or use --format onnx"
        )
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
        return _check(graph, lambda images: {k: v.numpy() for k, v in loaded(images).items()})


def pickles(archive: io.BytesIO | Path) -> list[str]:
    """The members of an exported program that are pickles.

    Raw tensors are named in the archive's `*_config.json`, with a word on each that is pickled;
    what else `torch.save` wrote ends in .pt, and is empty where there was nothing to save.
    """
    with zipfile.ZipFile(archive) as file:
        found = [
            info.filename
            for info in file.infolist()
            if info.filename.endswith((".pt", ".pkl")) and info.file_size > 0
        ]
        for name in file.namelist():
            if name.endswith("_config.json"):
                entries = json.loads(file.read(name))["config"].values()
                found += [entry["path_name"] for entry in entries if entry["use_pickle"]]
    return found


def _check(graph: Graph, run: Any) -> float:
    """The largest relative difference between `run` and `graph`, for a batch of one and of three.

    Raises:
        RuntimeError: if it is more than `CLOSE`.
    """
    worst = 0.0
    for batch in (1, 3):
        images = graph.example(batch)
        found = run(images)
        with torch.inference_mode():
            expected = graph(images)
        for name, value in expected.items():
            if found[name].shape != tuple(value.shape):
                raise RuntimeError(f"{name} became {found[name].shape}, not {tuple(value.shape)}")
            difference = np.abs(found[name] - value.numpy()).max() / value.abs().max().item()
            worst = max(worst, float(difference))
    if not worst <= CLOSE:
        raise RuntimeError(
            f"the written graph differs from the network by {worst:.1e}: it was not written"
        )
    return worst
