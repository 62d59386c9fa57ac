"""Stems of ViTs: their grid, their size, what leaves the project and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small import TINY_RUN, images
from torch import nn

import dino
from dino.files import UserError
from dino.models.backbone import has_batch_norm
from dino.models.create import create
from dino.models.vit import ViT

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "heads": 2, "image_size": 32}
STEMS = [("patch", 8), ("conv", 2), ("conv", 8), ("resnet", 4), ("resnet", 16), ("resnet", 32)]


@pytest.mark.parametrize(("stem", "patch"), STEMS)
def test_a_stem_makes_the_tokens_of_complete_patches(stem: Any, patch: int) -> None:
    vit = ViT(stem=stem, patch_size=patch, **SMALL).eval()
    pixels = torch.randn(2, 3, 2 * patch + patch - 1, 3 * patch + 1)
    with torch.no_grad():
        found = vit.features(pixels, attention=True)
        assert found.patches.shape == (1, 2, 32, 2, 3)
        assert found.attention is not None
        assert found.attention.shape == (2, 2, 7, 7)
        cropped = pixels[..., : 2 * patch, : 3 * patch]
        torch.testing.assert_close(vit(pixels), vit(cropped))
        torch.testing.assert_close(vit(pixels), found.cls[-1])
    assert has_batch_norm(vit) == (stem != "patch")
    assert vit.state_dict()[vit.first_layer].shape[1] == 3


def test_convolutions_double_in_width() -> None:
    """Section 4 of arXiv 2106.14881, at patch size 16: four of them, then one of 1x1."""
    vit = create("vit_small", patch_size=16, stem="conv")
    layers = [layer for layer in vit.patch_embed if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [48, 96, 192, 384, 384]
    assert [layer.kernel_size[0] for layer in layers] == [3, 3, 3, 3, 1]


def test_the_stages_are_those_of_resnet_10() -> None:
    vit = create("vit_tiny", patch_size=8, stem="resnet", channels=5)
    network = create("resnet10t", channels=5)
    stem = {name: x for name, x in vit.patch_embed.state_dict().items() if "proj" not in name}
    network.network.load_state_dict(stem, strict=False)
    pixels = torch.randn(2, 5, 40, 24)
    with torch.no_grad():
        x = network.eval().network.conv1(pixels)
        for name in ("bn1", "relu", "maxpool", "layer1", "layer2"):
            x = getattr(network.network, name)(x)
        found = vit.eval().patch_embed(pixels)
        torch.testing.assert_close(found, vit.patch_embed.proj(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "conv", "patch_size": 12}, "power of 2 that divides embed_dim 32"),
        ({"stem": "conv", "patch_size": 64, "image_size": 64}, "power of 2 that divides"),
        ({"stem": "resnet", "patch_size": 2}, "makes patches of 4, 8, 16, 32 px"),
    ],
)
def test_other_patch_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(**{**SMALL, **options})


@pytest.mark.parametrize("stem", ["conv", "resnet"])
def test_a_run_is_loaded_adapted_and_exported(stem: str, tmp_path: Path) -> None:
    settings = {**TINY_RUN, "model.stem": stem, "model.patch_size": 8, "run.duration": "2 steps"}
    settings |= {"views.global_size": 32, "views.local_size": 16}
    dino.pretrain("demo", data=images(), out=tmp_path / "run", settings=settings, device="cpu")
    trained = dino.load(tmp_path / "run")
    assert trained.spec["stem"] == stem
    more = {**settings, "pixels.channels": 2, "pixels.mean": (0.5, 0.5), "pixels.std": (0.2, 0.2)}
    started = {"run.duration": "1 steps", "execution.micro_batch": None, "optim.lr": 1e-5}
    dino.pretrain(
        *("demo",),
        data=list(torch.randint(0, 255, (16, 2, 32, 32), dtype=torch.uint8)),
        out=tmp_path / "two",
        init_from=tmp_path / "run",
        settings={key: x for key, x in {**more, **started}.items() if "model." not in key},
        device="cpu",
    )
    assert dino.load(tmp_path / "two").channels == 2
    with pytest.raises(UserError, match=r"timm has no ViT with this stem"):
        trained.timm_arguments(32)
    with pytest.raises(UserError, match=r"transformers has no ViT with this stem"):
        trained.transformers_config(32)
    torch.save(trained.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="it has a stem of convolutions"):
        dino.load(tmp_path / "bare.pth")
