"""Features computed by OpenVINO are those of the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import scene
from PIL import Image
from torch import nn

import dino
from dino.features.export import FeatureSettings, run
from dino.features.openvino_engine import openvino_engine
from dino.files import UserError
from dino.weights.load import save

pytest.importorskip("openvino")


def vit(**options: Any) -> Any:
    return dino.create("vit_tiny", patch_size=8, depth=2, embed_dim=48, image_size=32, **options)


@pytest.mark.parametrize("arch", ["vit", "resnet10t"])
def test_features_are_those_of_the_network(arch: str) -> None:
    backbone = (vit() if arch == "vit" else dino.create(arch)).eval()
    engine, images = openvino_engine(backbone, (40, 32)), torch.randn(5, 3, 40, 32)
    with torch.inference_mode():
        expected = backbone(images)
    torch.testing.assert_close(engine(images), expected, rtol=1e-4, atol=1e-5)
    half = openvino_engine(backbone, (40, 32), "bf16")(images)
    assert nn.functional.cosine_similarity(half, expected).min() > 0.999


def test_the_command_writes_the_same_features_as_with_pytorch(tmp_path: Path) -> None:
    save(vit(), tmp_path / "vit.safetensors")
    (tmp_path / "images").mkdir()
    for seed in range(5):
        Image.fromarray(scene(seed)).save(tmp_path / "images" / f"{seed}.png")
    common: dict[str, Any] = {"weights": str(tmp_path / "vit.safetensors"), "workers": 0}
    common |= {"data": str(tmp_path / "images"), "store": tmp_path / "store", "device": "cpu"}
    rows = {}
    for engine in ("torch", "openvino"):
        run(FeatureSettings(**common, engine=engine, out=tmp_path / f"{engine}.npy"))  # type: ignore[arg-type]
        rows[engine] = np.load(tmp_path / f"{engine}.npy")
    np.testing.assert_allclose(rows["openvino"], rows["torch"], rtol=1e-3, atol=1e-5)
    assert (rows["openvino"] != rows["torch"]).any()  # not the cached features of the other


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FeatureSettings(
        weights="w", data="d", out=tmp_path / "f.npy", engine="openvino", device="meta"
    )
    monkeypatch.setattr("dino.features.export.pick_device", torch.device)
    with pytest.raises(UserError, match="add --device cpu"):
        run(settings)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'dino-ssl\[openvino\]'"):
        openvino_engine(vit(), (32, 32))
