"""The transform beside foreign weights, and what their configuration says of the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.weights.foreign_config import of_timm, of_transformers
from dino.weights.load import read_checkpoint

HALF = (0.5, 0.5, 0.5)


def test_transforms_of_timm() -> None:
    given = {"input_size": [3, 224, 224], "crop_pct": 0.9, "mean": HALF, "std": HALF}
    assert of_timm({"pretrained_cfg": given}) == Preprocessing(248, 224, HALF, HALF)
    assert of_timm(given) == Preprocessing(248, 224, HALF, HALF)  # as older folders have it
    other = {"input_size": [3, 96, 96], "interpolation": "bilinear", "crop_mode": "squash"}
    assert of_timm(other) == Preprocessing(109, 96, interpolation="bilinear", squash=True)
    assert of_timm({}) is None
    for wrong in ({"crop_mode": "border"}, {"input_size": [3, 96, 128]}, {"interpolation": "box"}):
        with pytest.raises(UserError, match=r"transform|interpolation"):
            of_timm({**other, **wrong})


def test_transforms_of_transformers() -> None:
    vit = {"size": {"height": 224, "width": 224}, "image_mean": HALF, "image_std": HALF}
    expected = Preprocessing(224, 224, HALF, HALF, "bilinear", squash=True)
    assert of_transformers(vit) == expected
    assert of_transformers({**vit, "size": 224, "resample": 2}) == expected  # as older folders
    crop = {"size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True}
    assert of_transformers({**crop, "crop_size": {"height": 224, "width": 224}}) == Preprocessing()
    assert of_transformers({**crop, "crop_size": 224}) == Preprocessing()
    assert of_transformers({}) is None
    for wrong in (
        {"do_resize": False},
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"resample": 0},
        {"size": {"height": 224, "width": 256}},
        {"size": {"longest_edge": 256}},
        {"size": {"shortest_edge": 256}},
    ):
        with pytest.raises(UserError, match=r"transform|interpolation"):
            of_transformers({**vit, **wrong})


def test_damaged_configurations(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    for config in (
        {"architecture": 3},
        {"architecture": name, "model_args": [1]},
        {"architecture": name, "model_args": {"depth": 1}, "pretrained_cfg": {"input_size": 3}},
        {"architecture": name, "model_args": {"depth": 1}, "pretrained_cfg": 3},
    ):
        assert "is damaged" in refused(folder(tmp_path / "m", config))


def folder(path: Path, config: dict[str, Any], arch: str = "vit_tiny", **more: Any) -> Path:
    path.mkdir(exist_ok=True)
    backbone = dino.create(arch, depth=1) if arch.startswith("vit") else dino.create(arch)
    tensors = {n.removeprefix("network."): t for n, t in backbone.state_dict().items()}
    save_file({**tensors, **more}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        dino.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_configurations_of_other_networks(tmp_path: Path) -> None:
    assert "transformers' swin, which is none of dino's networks (vit, deit" in refused(
        folder(tmp_path / "a", {"model_type": "swin"})
    )
    assert "transformers' vit with gelu_new, which dino computes with gelu only" in refused(
        folder(tmp_path / "b", {"hidden_act": "gelu_new"})
    )
    (tmp_path / "a" / "config.json").write_text("[]")
    assert "is not a JSON object" in refused(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(" " * 2**21)
    assert "too large" in refused(tmp_path / "a")
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "model.safetensors.index.json").write_text("{}")
    assert "names no files of tensors" in refused(tmp_path / "several")


def test_vits_of_timm_that_are_not_ours(tmp_path: Path) -> None:
    """The same tensors, computed with otherwise: refused, or left to timm itself."""
    pytest.importorskip("timm")
    config: dict[str, Any] = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    ours = folder(tmp_path / "m", config)
    assert dino.load(ours).spec["arch"] == "vit_small"

    def with_arguments(**arguments: Any) -> str:
        (ours / "config.json").write_text(
            json.dumps({**config, "model_args": {"depth": 1, **arguments}})
        )
        return refused(ours)

    assert "does not support: act_layer, depth" in with_arguments(act_layer="relu")
    assert "depth, global_pool" in with_arguments(global_pool="avg")
    torch.save({"x": os.getcwd}, tmp_path / "hostile.pth")  # which timm would open
    assert "checkpoint_path" in with_arguments(checkpoint_path=str(tmp_path / "hostile.pth"))
    assert "pretrained" in with_arguments(pretrained=True)
    (ours / "config.json").write_text(json.dumps({"architecture": "vit_of_tomorrow"}))
    assert "which the installed timm does not have" in refused(ours)
    heads = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1, "num_heads": 6}}
    (ours / "config.json").write_text(json.dumps(heads))
    assert dino.load(ours).spec["heads"] == 6


def test_other_networks_of_timm_stay_timms(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    name = "mobilenetv3_small_050"
    classifier = {"classifier.weight": torch.zeros(7, 1024), "classifier.bias": torch.zeros(7)}
    given = {"classifier": "classifier", "input_size": [3, 96, 96], "crop_pct": 0.875}
    config = {"architecture": name, "pretrained_cfg": given}
    path = folder(tmp_path / "m", config, f"timm:{name}", **classifier)
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec == {"arch": f"timm:{name}"}
    assert checkpoint.preprocessing == Preprocessing(109, 96)
    assert "classifier.bias, classifier.weight" in " ".join(checkpoint.notes)
    adapted = dino.load(path, channels=1)
    assert adapted(torch.zeros(1, 1, 64, 64)).shape == (1, 1024)
    (path / "config.json").write_text(json.dumps({**config, "model_args": {"img_size": [96, 64]}}))
    assert "timm cannot build its mobilenetv3_small_050 (MobileNetV3" in refused(path)
    vit = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": [96, 64]}}
    assert "not square" in refused(folder(tmp_path / "vit", vit))
    (path / "config.json").write_text(json.dumps({"architecture": name}))
    assert "unexpected network.classifier.bias" in refused(path)
