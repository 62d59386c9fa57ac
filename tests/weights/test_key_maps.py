"""Every table read forth and back gives the same bits, and knows its own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dino
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.weights.key_maps import LAYOUTS, detect, family_of, from_dino, layout_of, to_dino
from dino.weights.load import fingerprint, load, save

DIALECTS = ("official", "timm", "transformers", "transformers5")


def scrambled(backbone: Backbone) -> Backbone:
    """With every tensor random, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(0)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    return backbone.eval()


def vit(arch: str, patch: int, side: int) -> Backbone:
    return scrambled(dino.create(arch, depth=2, patch_size=patch, image_size=patch * side))


def written(folder: Path, dialect: str, backbone: Backbone) -> Path:
    """`backbone` in a file as the dialect's own library leaves it."""
    tensors = from_dino(backbone.state_dict(), dialect, backbone.spec)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    folder.mkdir()
    if dialect == "official":
        torch.save(tensors, folder / "w.pth")
        return folder / "w.pth"
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "vit", "layer_norm_eps": 1e-6}
    config["num_attention_heads"] = backbone.heads
    if dialect == "timm":
        sizes = {
            "embed_dim": backbone.embed_dim,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
        }
        sizes |= {"patch_size": backbone.patch_size, "img_size": backbone.spec["image_size"]}
        config = {"architecture": "vit_small_patch16_224", "model_args": sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dialect", ["dino", *DIALECTS])
@pytest.mark.parametrize(
    ("arch", "patch", "side"),
    [("vit_tiny", 8, 7), ("vit_tiny", 16, 3), ("vit_small", 16, 5), ("vit_base", 8, 4)],
)
def test_round_trips_are_exact(
    dialect: str, arch: str, patch: int, side: int, tmp_path: Path
) -> None:
    if dialect == "timm":
        pytest.importorskip("timm")
    original = vit(arch, patch, side)
    if dialect == "dino":
        save(original, tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
    else:
        path = written(tmp_path / "there", dialect, original)
    found = load(path)
    assert fingerprint(found) == fingerprint(original)
    assert found.origin is not None
    assert found.origin["dialect"] == dialect
    for name in ("embed_dim", "depth", "heads", "patch_size", "grid"):
        assert getattr(found, name) == getattr(original, name)
    images = torch.randn(2, 3, patch * side, patch * side)  # at the native size: any `position`
    assert torch.equal(found(images), original(images))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_table_covers_an_entire_network(dialect: str) -> None:
    original = dino.create("vit_small")
    theirs = from_dino(original.state_dict(), dialect, original.spec)
    layout = layout_of(dialect, "vit")
    ours, left_out = to_dino(theirs, layout)
    assert left_out == []
    assert ours.keys() == original.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in original.state_dict().items())
    if dialect.startswith("transformers"):
        assert not set(theirs) & set(ours)


@pytest.mark.parametrize("arch", ["resnet10t", "resnet18", "resnet50"])
@pytest.mark.parametrize("dialect", ["official", "timm", "torchvision"])
def test_resnets(dialect: str, arch: str) -> None:
    original = scrambled(dino.create(arch))
    theirs = from_dino(original.state_dict(), dialect, original.spec)
    assert original.first_layer.removeprefix("network.") in theirs
    theirs["fc.weight"], theirs["fc.bias"] = torch.zeros(5, 2048), torch.zeros(5)
    found = detect(theirs)
    assert found is not None
    assert found.dialect == "torchvision"  # by its classifier
    ours, left_out = to_dino(theirs, found)
    assert left_out == ["fc.bias", "fc.weight"]
    assert all(torch.equal(ours[name], tensor) for name, tensor in original.state_dict().items())


def test_official_xcit_is_timms() -> None:
    """The split of the class attention's qkv is the one that timm itself applies."""
    xcit = pytest.importorskip("timm.models.xcit")
    original = scrambled(dino.create("timm:xcit_nano_12_p16_224"))
    official = from_dino(original.state_dict(), "official", original.spec)
    assert "cls_attn_blocks.1.attn.qkv.bias" in official
    assert "pos_embeder.token_projection.weight" in official
    found = detect(official)
    assert found is not None
    assert (found.dialect, found.family) == ("official", "xcit")
    ours, _ = to_dino(official, found)
    assert ours.keys() == original.state_dict().keys()
    theirs = xcit.checkpoint_filter_fn(dict(official), original.network)
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"network.{name}"], tensor)
        assert torch.equal(original.state_dict()[f"network.{name}"], tensor)


def test_an_incomplete_group_stays_as_it_is() -> None:
    """So that a strict load names what is there and what is not."""
    backbone = dino.create("vit_tiny", embed_dim=24, depth=1, heads=2)
    theirs = from_dino(backbone.state_dict(), "transformers", backbone.spec)
    key = "encoder.layer.0.attention.attention.key.bias"
    del theirs[key]
    ours, _ = to_dino(theirs, layout_of("transformers", "vit"))
    assert "blocks.0.attn.qkv.bias" not in ours
    assert key.replace("key", "query") in ours
    assert "blocks.0.attn.qkv.weight" in ours


@pytest.mark.parametrize("shape", [(), (5, 7)])
def test_shapes_that_cannot_be_joined(shape: tuple[int, ...], tmp_path: Path) -> None:
    backbone = dino.create("vit_tiny", embed_dim=24, depth=1, heads=2)
    theirs = from_dino(backbone.state_dict(), "transformers", backbone.spec)
    theirs["encoder.layer.0.attention.attention.key.weight"] = torch.zeros(shape)
    torch.save(theirs, tmp_path / "w.pth")
    with pytest.raises(UserError, match="looks like weights of transformers vit, but"):
        load(tmp_path / "w.pth", heads=2)


def test_layouts_are_distinguished() -> None:
    tensors: dict[str, Tensor] = {}
    assert detect(tensors) is None
    for layout in LAYOUTS:
        if layout.anchors:
            assert detect(layout.anchors) == layout
    with pytest.raises(UserError, match="transformers has no layout for resnet: choose official"):
        layout_of("transformers", "resnet")
    assert family_of({"arch": "timm:xcit_small_12_p8_224"}) == "xcit"
    assert family_of({"arch": "timm:xcit_small_12_p8_224"}, "timm") == "timm"
    assert family_of({"arch": "vit_tiny"}) == "vit"
