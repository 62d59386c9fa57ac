"""The published names, numbers and places."""

from __future__ import annotations

import pytest
import torch

import dino
from dino.weights.published import CATALOGUE


def test_what_is_published() -> None:
    names = {p.name for p in CATALOGUE.values() if p.kind == "backbone"}
    assert names == {
        *("dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8", "dino_resnet50"),
        *("dino_xcit_small_12_p16", "dino_xcit_small_12_p8"),
        *("dino_xcit_medium_24_p16", "dino_xcit_medium_24_p8"),
        *("dino_vits8_300ep", "dino_vits16_googlelandmark"),
        *(f"dinov2_vit{size}14{reg}" for size in "sblg" for reg in ("", "_reg")),
        *("dinov3_vits16", "dinov3_vits16plus", "dinov3_vitb16", "dinov3_vitl16"),
        *("dinov3_vith16plus", "dinov3_vit7b16", "dinov3_vitl16_sat", "dinov3_vit7b16_sat"),
        *(f"dinov3_convnext_{size}" for size in ("tiny", "small", "base", "large")),
    }
    first = CATALOGUE["dino_vits8_linear"]
    assert first.file == "dino_deitsmall8_pretrain/dino_deitsmall8_linearweights.pth"
    assert (first.knn, first.linear) == (78.3, 79.7)
    assert CATALOGUE["dino_vitb8_onnx"].file == "dino_vitbase8_pretrain/dino_vitb8.onnx"
    assert "dino_xcit_small_12_p8_onnx" not in CATALOGUE
    assert len({p.file for p in CATALOGUE.values()}) == len(CATALOGUE)
    assert all(not p.file.startswith("/") and ".." not in p.file for p in CATALOGUE.values())


@pytest.mark.parametrize("name", [p.name for p in CATALOGUE.values() if p.kind == "backbone"])
def test_architectures_have_the_published_size(name: str) -> None:
    published = CATALOGUE[name]
    if "xcit" in name:
        pytest.importorskip("timm")
    with torch.device("meta"):
        backbone = dino.create(**published.spec)
    count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    assert published.parameters - 0.5 < count < published.parameters + 1
    assert backbone.registers == published.spec.get("registers", 0)


def test_names_of_successors() -> None:
    found = CATALOGUE["dinov2_vitg14_reg"]
    assert found.file == "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    assert (found.knn, found.linear, found.heads) == (83.7, 87.1, 24)
    assert found.origin.licence == "Apache-2.0"
    satellite = CATALOGUE["dinov3_vitl16_sat"]
    assert satellite.file == "dinov3_vitl16/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    assert satellite.origin.licence == "DINOv3 License"
    assert satellite.preprocessing is not None
    assert satellite.preprocessing.std == (0.213, 0.156, 0.143)
