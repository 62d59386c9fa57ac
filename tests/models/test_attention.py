"""Attention maps of the CLS token, and masks of their mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.files import UserError
from dino.models.attention import attention_maps, mass_mask
from dino.models.create import create


def test_maps_are_the_cls_row_of_the_last_block() -> None:
    vit = create("vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=4, image_size=8).eval()
    images = torch.randn(2, 3, 13, 22)  # no multiple of the patch, and not square
    maps = attention_maps(vit, images)
    features = vit.features(images, attention=True)
    full = features.attention
    assert full is not None
    assert torch.equal(features.attention_maps, maps)
    assert maps.shape == (2, 3, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(maps[..., row, column], full[:, :, 0, 1 + 5 * row + column])


def test_keys_are_those_of_the_attention() -> None:
    vit = create("vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=4, image_size=8).eval()
    images = torch.randn(2, 3, 13, 22)
    rows: list[torch.Tensor] = []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, out: rows.append(out))
    features = vit.features(images, attention=True)
    queries, keys, _ = rows[0].chunk(3, dim=2)  # [2, 16, 12] each
    split = (queries.unflatten(2, (3, 4)), keys.unflatten(2, (3, 4)))
    logits = torch.einsum("bqhd,bkhd->bhqk", *split) / 2
    assert torch.allclose(features.attention, logits.softmax(dim=-1), atol=1e-6)
    assert torch.equal(features.keys, split[1].transpose(1, 2))
    assert features.key_maps.shape == (2, 12, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(features.key_maps[..., row, column], keys[:, 1 + 5 * row + column])


def test_networks_without_attention_raise() -> None:
    with pytest.raises(UserError, match="attention"):
        attention_maps(create("resnet50").eval(), torch.randn(1, 3, 32, 32))


def test_maps_of_features_without_attention_raise() -> None:
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=3, patch_size=4, image_size=8)
    with pytest.raises(UserError, match=r"needs features\(images, attention=True\)"):
        _ = vit.features(torch.randn(1, 3, 8, 8)).attention_maps
    with pytest.raises(UserError, match=r"needs features\(images, attention=True\)"):
        _ = vit.features(torch.randn(1, 3, 8, 8)).key_maps


def test_mask_of_the_notes() -> None:
    mass = torch.tensor([[0.05, 0.1, 0.15, 0.3, 0.4]])
    assert mass_mask(mass).tolist() == [[False, False, False, True, True]]
    assert mass_mask(mass.flip(1)).tolist() == [[True, True, False, False, False]]


def test_masks_are_computed_for_each_map() -> None:
    maps = torch.rand(2, 3, 4, 5)
    masks = mass_mask(maps, 0.4)
    assert masks.shape == maps.shape
    for batch in range(2):
        for head in range(3):
            assert torch.equal(masks[batch, head], mass_mask(maps[batch, head], 0.4))


def test_full_mass_includes_every_patch() -> None:
    assert mass_mask(torch.rand(3, 4) + 0.01, 1.0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), mass=st.floats(0.05, 0.95), scale=st.floats(0.01, 100))
def test_mask_is_the_smallest_that_holds_the_mass(seed: int, mass: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4, 5, generator=generator, dtype=torch.float64) ** 3
    mask = mass_mask(values * scale, mass)
    shares = values / values.sum()
    assert shares[mask].sum() >= mass - 1e-9
    assert shares[mask].sum() - shares[mask].min() <= mass + 1e-9  # one patch less holds too little
    assert not (~mask).any() or shares[mask].min() >= shares[~mask].max()
