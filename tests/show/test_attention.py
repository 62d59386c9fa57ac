"""Attention maps, masks of the mass, and their pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.files import UserError
from dino.models.create import create
from dino.show.attention import attention_maps, colored, mass_mask, overlay, whole_patches


def test_maps_are_the_cls_row_of_the_last_block() -> None:
    vit = create("vit_tiny", width=12, depth=2, heads=3, patch_size=4, image_size=8).eval()
    images = torch.randn(2, 3, 13, 22)  # no multiple of the patch, and not square
    maps = attention_maps(vit, images)
    full = vit.features(images, attention=True).attention
    assert full is not None
    assert maps.shape == (2, 3, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(maps[..., row, column], full[:, :, 0, 1 + 5 * row + column])


def test_networks_without_attention_say_so() -> None:
    with pytest.raises(UserError, match="attention"):
        attention_maps(create("resnet50").eval(), torch.randn(1, 3, 32, 32))


def test_mask_of_the_notes() -> None:
    mass = torch.tensor([[0.05, 0.1, 0.15, 0.3, 0.4]])
    assert mass_mask(mass).tolist() == [[False, False, False, True, True]]
    assert mass_mask(mass.flip(1)).tolist() == [[True, True, False, False, False]]


def test_every_map_has_a_mask_of_its_own() -> None:
    maps = torch.rand(2, 3, 4, 5)
    masks = mass_mask(maps, 0.4)
    assert masks.shape == maps.shape
    for batch in range(2):
        for head in range(3):
            assert torch.equal(masks[batch, head], mass_mask(maps[batch, head], 0.4))


def test_whole_mass_keeps_every_patch() -> None:
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


def test_colors_go_from_the_smallest_to_the_largest() -> None:
    values = torch.tensor([[-3.0, 5.0], [1.0, -3.0]])
    found = np.asarray(colored(values, (8, 6), "gray"))
    assert found.shape == (6, 8, 3)
    assert (found[:3, :4] == 0).all()
    assert (found[:3, 4:] == 255).all()
    assert (found[3:, :4] == found[3, 0]).all()
    assert 120 <= found[3, 0, 0] <= 136


def test_a_constant_map_is_one_color() -> None:
    found = np.asarray(colored(torch.full((2, 2), 0.3), (4, 4), "viridis"))
    assert (found == found[0, 0]).all()


def test_overlay_blends_by_strength() -> None:
    image = Image.new("RGB", (6, 4), (200, 100, 0))
    values = torch.rand(2, 3)
    heat = colored(values, (6, 4), "inferno")
    assert overlay(image, values, strength=0.0).tobytes() == image.tobytes()
    assert overlay(image, values, strength=1.0).tobytes() == heat.tobytes()
    assert overlay(image, values).size == image.size


def test_whole_patches_cuts_right_and_below() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (21, 35, 3), dtype=np.uint8)
    cut = whole_patches(Image.fromarray(noise), 8)
    assert np.array_equal(np.asarray(cut), noise[:16, :32])
