"""Graphs for other runtimes equal the network that they were written from."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.weights.export import graph as export_graph
from dino.weights.export.graph import Graph, fixed, pickles, write_exported_program, write_onnx

# Exporters hand symbolic sizes through our functions, which no check of shapes may look at.
pytestmark = pytest.mark.usefixtures("unchecked")

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32}
ABOUT = {"spec": {"arch": "vit_tiny"}, "sha256": "0" * 64}


def tiny(**changes: Any) -> Backbone:
    torch.manual_seed(0)
    return dino.create("vit_tiny", **{**TINY, **changes}).eval()


def expected(backbone: Backbone, images: Tensor, attention: bool = False) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        found = backbone.features(images, attention=attention)
    named = {"cls": found.cls[0], "patches": found.patches[0], "attention": found.attention}
    return {name: value.numpy() for name, value in named.items() if value is not None}


def assert_close(found: dict[str, np.ndarray], correct: dict[str, np.ndarray]) -> None:
    assert list(found) == list(correct)
    for name, value in correct.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def runtime(path: Path) -> Any:
    """The file's outputs by name, from onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


# ------------------------------------------------------------------------------------ ONNX
@pytest.mark.parametrize(
    ("options", "size", "attention"),
    [
        ({"position": "reference"}, (40, 64), True),
        ({"position": "exact", "patch_size": 16, "channels": 4}, (80, 48), False),
        ({"image_size": 40}, (37, 24), True),  # an odd grid; five rows of pixels fill no patch
    ],
)
def test_onnx_equals_the_network(
    options: dict[str, Any], size: tuple[int, int], attention: bool, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    backbone, path = tiny(**options), tmp_path / "tiny.onnx"
    write_onnx(Graph(backbone, size, attention), path, ABOUT)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert "Resize" not in {node.op_type for node in model.graph.node}
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props}["dino"] == ABOUT
    run = runtime(path)
    for batch in (1, 3):
        images = torch.randn(batch, options.get("channels", 3), *size)
        assert_close(run(images.numpy()), expected(backbone, images, attention))


def test_onnx_of_a_convnet_gives_the_pooled_feature_and_the_last_map(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    backbone = dino.create("timm:resnet10t", channels=2).eval()
    write_onnx(Graph(backbone, (64, 96)), tmp_path / "net.onnx", ABOUT)
    images = torch.randn(3, 2, 64, 96)
    found = runtime(tmp_path / "net.onnx")(images.numpy())
    assert_close(found, expected(backbone, images))
    assert found["patches"].shape == (3, 512, 2, 3)


def test_normalization_can_lie_inside(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    backbone = tiny()
    backbone.preprocessing = Preprocessing(36, 32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    graph = Graph(backbone, (32, 32), normalizes=True)
    write_onnx(graph, tmp_path / "tiny.onnx", ABOUT)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = F.normalize(pixels / 255, [0.1, 0.2, 0.3], [0.5, 0.4, 0.3])
    found = runtime(tmp_path / "tiny.onnx")(pixels.numpy())
    assert_close(found, expected(backbone, normalised))


def test_newer_opsets_are_written_and_older_ones_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = Graph(tiny(), (32, 32))
    write_onnx(graph, tmp_path / "tiny.onnx", ABOUT, opset=20)
    assert onnx.load(tmp_path / "tiny.onnx").opset_import[0].version == 20
    with pytest.raises(UserError, match="--opset 17 is not supported: use 18 or newer"):
        write_onnx(graph, tmp_path / "old.onnx", ABOUT, opset=17)


def test_errors_name_what_onnx_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    graph = Graph(tiny(), (32, 32))
    monkeypatch.setattr(export_graph, "TWO_GIGABYTES", 1000)
    with pytest.raises(UserError, match="one ONNX file holds 2: use --format exported-program"):
        write_onnx(graph, tmp_path / "tiny.onnx", ABOUT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'dino-ssl\[onnx\]'"):
        write_onnx(graph, tmp_path / "tiny.onnx", ABOUT)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ programs
@pytest.mark.parametrize(
    ("options", "size", "attention"),
    [({}, (32, 32), False), ({"position": "reference", "channels": 1}, (40, 64), True)],
)
def test_exported_program_equals_the_network_and_holds_no_pickle(
    options: dict[str, Any], size: tuple[int, int], attention: bool, tmp_path: Path
) -> None:
    backbone, path = tiny(**options), tmp_path / "tiny.pt2"
    write_exported_program(Graph(backbone, size, attention), path, ABOUT)
    extra = {"dino.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["dino.json"]) == ABOUT
    for batch in (1, 3):
        images = torch.randn(batch, options.get("channels", 3), *size)
        found = {name: value.detach().numpy() for name, value in loaded(images).items()}
        assert_close(found, expected(backbone, images, attention))
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            content = file.read(info)
            assert not content.startswith(b"PK"), f"{info.filename} was written by torch.save"
            assert b"torch._utils" not in content, f"{info.filename} is a pickle"


def test_a_pickle_in_an_exported_program_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(tiny(), (32, 32))
    program = torch.export.export(graph, (graph.example(2),), dynamic_shapes=graph.dynamic())
    torch.export.save(program, tmp_path / "with.pt2")
    (name,) = pickles(tmp_path / "with.pt2")
    assert name.endswith("sample_inputs/model.pt")
    monkeypatch.setattr(export_graph, "pickles", lambda archive: [name])
    with pytest.raises(UserError, match="puts pickles into exported programs"):
        write_exported_program(graph, tmp_path / "tiny.pt2", ABOUT)
    assert not (tmp_path / "tiny.pt2").exists()


def test_graphs_hold_no_operation_that_only_some_machines_have() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # where `models.linear` would take oneDNN's convolution
    try:
        graph = Graph(tiny(image_size=256), (256, 256))
        program = torch.export.export(graph, (graph.example(2),), dynamic_shapes=graph.dynamic())
    finally:
        torch.set_num_threads(threads)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert {name.split(".")[0] for name in called} <= {"aten", "<built-in function getitem>"}
    assert sum("conv" in name for name in called) == 1  # the patches
    assert not any("upsample" in name for name in called)


# ------------------------------------------------------------------------------------ the graph
def test_a_fixed_network_leaves_the_original_alone() -> None:
    backbone = tiny(position="reference").double().train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    twin = fixed(backbone, (48, 16))
    assert twin.pos_embed.shape == (1, 1 + 6 * 2, 24)
    assert not twin.training
    assert twin.pos_embed.dtype == torch.float32
    assert backbone.training
    assert backbone.grid == (4, 4)
    assert all(torch.equal(tensor, before[n]) for n, tensor in backbone.state_dict().items())
    native = fixed(backbone, (32, 32)).state_dict()
    assert torch.equal(native["pos_embed"], before["pos_embed"].float())


def test_impossible_graphs_are_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="images of 32x4 px hold no patch of 8 px"):
        Graph(tiny(), (32, 4))
    with pytest.raises(UserError, match="resnet10t has no CLS attention to export"):
        Graph(dino.create("timm:resnet10t"), (32, 32), attention=True)


def test_a_graph_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(tiny(), (32, 32))
    wrong = [(value + 1e-2).numpy() for value in graph(graph.example(3)).values()]
    with pytest.raises(RuntimeError, match="cls became"):
        export_graph.check_graph(graph, lambda images: wrong)
    with pytest.raises(RuntimeError, match="differs from the network"):
        export_graph.check_graph(graph, lambda images: [value[: len(images)] for value in wrong])
    monkeypatch.setattr(export_graph, "CLOSE", -1.0)
    with pytest.raises(RuntimeError, match="was not written"):
        write_exported_program(graph, tmp_path / "tiny.pt2", ABOUT)
    assert not list(tmp_path.iterdir())
