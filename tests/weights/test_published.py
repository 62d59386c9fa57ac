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
