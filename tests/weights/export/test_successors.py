"""DINOv2, DINOv3 and ConvNeXt in other libraries' layouts: what they compute there, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import assert_agree, scrambled
from torch import Tensor

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.weights.export.command import Export, Format, run
from dino.weights.load import fingerprint, save

V2: dict[str, Any] = {"layer_scale": 1.0, "position": "reference"}
V3: dict[str, Any] = {
    **{"layer_scale": 1.0, "position": "rope", "registers": 4, "key_bias": False},
    "norm_eps": 1e-5,
}
GATED: dict[str, Any] = {"mlp": "swiglu", "mlp_ratio": 88.5 / 32}
KINDS: dict[str, dict[str, Any]] = {
    "dinov2": V2,
    "dinov2 registers": {**V2, "registers": 2, "position": "antialias"},
    "dinov2 giant": {**V2, **GATED},
    "dinov3": V3,
    "dinov3 plus": {**V3, **GATED},
    "registers alone": {"registers": 1, "position": "exact"},
    "convnext": {},
}


def network(kind: str) -> Backbone:
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 2, "heads": 2, "patch_size": 8}
    if kind == "convnext":
        made = dino.create("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    else:
        made = dino.create("vit_small", **sizes, image_size=32, **KINDS[kind])
    scrambled(made)
    if kind.startswith("dinov3"):
        made.load_state_dict(
            {n: _without_keys(t) if n.endswith("qkv.bias") else t for n, t in _periods(made)}
        )
    side = 64 if kind == "convnext" else 32
    made.preprocessing = Preprocessing(side + 4, side)
    return made


def _without_keys(bias: Tensor) -> Tensor:
    q, k, v = bias.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


def _periods(made: Any) -> list[tuple[str, Tensor]]:
    fresh = {"rope_embed.periods": 100 ** (torch.arange(4) / 4)}
    return list({**made.state_dict(), **fresh}.items())


def exported(made: Backbone, folder: Path, format: Format) -> Path:
    save(made, folder / "w.safetensors")
    out = folder / ("out.safetensors" if format == "official" else "out")
    run(Export(weights=str(folder / "w.safetensors"), format=format, out=out))
    return out


def images(made: Backbone) -> Tensor:
    return torch.randn(2, 3, *[made.preprocessing.crop] * 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_official_and_back(kind: str, tmp_path: Path) -> None:
    made = network(kind)
    again = dino.load(exported(made, tmp_path, "official"))
    assert fingerprint(again) == fingerprint(made)
    assert again.preprocessing == made.preprocessing
    wide = torch.randn(1, 3, 64, 96)  # positions are resampled as before
    assert torch.equal(again(wide), made(wide))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_timm_and_back(kind: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    made = network(kind)
    folder = exported(made, tmp_path, "timm")
    config = json.loads((folder / "config.json").read_text())
    theirs = timm.create_model(
        config["architecture"],
        num_classes=0,
        checkpoint_path=folder / "model.safetensors",
        **config["model_args"],
    ).eval()
    pictures = images(made)
    assert_agree(theirs(pictures), made(pictures))
    again = dino.load(folder)
    assert torch.equal(again(pictures), made(pictures))
    assert (fingerprint(again) == fingerprint(made)) is ("registers" not in kind)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_transformers_and_back(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = network(kind)
    folder = exported(made, tmp_path, "transformers")
    theirs, found = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())  # nothing is missing or left over
    pictures = images(made)
    assert_agree(theirs.eval()(pictures).last_hidden_state[:, 0], made(pictures))
    again = dino.load(folder)
    assert torch.equal(again(pictures), made(pictures))
    assert (fingerprint(again) == fingerprint(made)) is (kind != "registers alone")


@pytest.mark.parametrize(
    ("parts", "format", "words"),
    [
        ({**V3, "norm_eps": 1e-6}, "timm", "rotary positions have the norm epsilon 1e-05, this"),
        ({**V3, "key_bias": True}, "timm", "have no bias of keys, this one has"),
        ({**V2, "mlp_ratio": 2.5}, "transformers", "has no MLP of 80 for embed_dim 32"),
        ({**V2, "norm_eps": 1e-5}, "timm", "have the norm epsilon 1e-06, this one has 1e-05"),
    ],
)
def test_what_a_library_does_not_have(
    parts: dict[str, Any], format: Format, words: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 1, "heads": 2, "patch_size": 8}
    made = dino.create("vit_small", **sizes, image_size=32, **parts)
    with pytest.raises(UserError, match=words):
        exported(made, tmp_path, format)


def test_other_periods_stay_here(tmp_path: Path) -> None:
    made: Any = network("dinov3")
    made.rope_embed.periods *= 2
    for format in ("timm", "transformers"):
        with pytest.raises(UserError, match="periods"):
            exported(made, tmp_path, format)
    assert fingerprint(dino.load(exported(made, tmp_path, "official"))) == fingerprint(made)
