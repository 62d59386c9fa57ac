"""Attention maps of the CLS token, and masks of their mass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.files import UserError
from dino.models.attention import attention_maps, mass_mask
from dino.models.create import create
from dino.models.vit import ViT


def small_vit(**options: Any) -> ViT:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 3, "heads": 3, "patch_size": 4, "image_size": 8}
    vit = ViT(**{**sizes, **options}).eval()
    for name, parameter in vit.named_parameters():  # the published init attends evenly
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return vit


IMAGES = (2, 3, 13, 22)
"""No multiple of the patch, and not square: 3 x 5 patches."""


def test_maps_are_the_cls_row_of_the_last_block() -> None:
    vit, images = small_vit(), torch.randn(IMAGES)
    maps = attention_maps(vit, images)
    with torch.inference_mode():
        features = vit.features(images, attention=True)
    full = features.attention
    assert full is not None
    torch.testing.assert_close(features.attention_maps, maps, rtol=0, atol=1e-6)
    assert maps.shape == (2, 3, 3, 5)
    for row in range(3):
        for column in range(5):
            expected = full[:, :, 0, 1 + 5 * row + column]
            torch.testing.assert_close(maps[..., row, column], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_is_that_of_queries_and_keys(block: int) -> None:
    vit, images = small_vit(), torch.randn(IMAGES)
    with torch.inference_mode():
        found = vit.features(images, attention=block).attention
        x, _ = vit.tokens(images)
        for earlier in vit.blocks[: block % 3]:
            x = earlier(x)
        qkv = vit.blocks[block].attn.qkv(vit.blocks[block].norm1(x))
    assert found is not None
    q, k, _ = qkv.double().view(2, 16, 3, 3, 4).unbind(2)  # [B, T, heads, d]
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k).div(4**0.5).softmax(-1)
    assert expected.std(dim=-1).mean() > 0.05  # far from uniform
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [[0], [15], [7, 0, 3, 3]])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rows_are_those_of_the_matrix(queries: list[int], dtype: torch.dtype, atol: float) -> None:
    vit, images = small_vit().to(dtype), torch.randn(IMAGES, dtype=dtype)
    with torch.inference_mode():
        for block in (0, 1, -1):
            found = vit.attention_rows(images, queries, block)
            full = vit.features(images, attention=block).attention
            assert full is not None
            torch.testing.assert_close(found, full[:, :, queries], rtol=0, atol=atol)


def test_maps_of_a_patch_in_another_block() -> None:
    vit, images = small_vit(), torch.randn(IMAGES)
    with torch.inference_mode():
        full = vit.features(images, attention=1).attention
    assert full is not None
    expected = full[:, :, 1 + 2 * 5 + 3, 1:].unflatten(2, (3, 5))
    found = attention_maps(vit, images, block=1, query=(2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_later_blocks_are_not_computed() -> None:
    vit, images = small_vit(), torch.randn(IMAGES)
    expected = attention_maps(vit, images, block=1)
    torch.nn.init.constant_(vit.blocks[2].norm1.weight, torch.nan)
    torch.nn.init.constant_(vit.blocks[1].mlp.fc1.weight, torch.nan)
    assert torch.equal(attention_maps(vit, images, block=1), expected)


@pytest.mark.parametrize("block", [3, -4])
def test_blocks_that_do_not_exist_raise(block: int) -> None:
    with pytest.raises(UserError, match=f"there is no block {block}: the network has 3"):
        attention_maps(small_vit(), torch.randn(IMAGES), block=block)


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
