"""Masks of the attention's mass against the reference's."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_set import assert_agree, golden_vit, manifest, part, tensors

from dino.models.attention import attention_maps, mass_mask

CONFIG = manifest()["config"]
SIZES = [tuple(size) for size in CONFIG["input_sizes"]]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_golden_mass_mask(height: int, width: int) -> None:
    golden = part(tensors("vit.safetensors"), f"{height}x{width}.")
    grid = (height // CONFIG["patch_size"], width // CONFIG["patch_size"])
    maps = golden["last_attention"][:, :, 0, 1:].unflatten(2, grid)
    assert torch.equal(mass_mask(maps)[0], golden["mask60"])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_golden_masks_of_maps_from_one_query(height: int, width: int) -> None:
    golden = tensors("vit.safetensors")
    vit, expected = golden_vit(part(golden, "state.")), part(golden, f"{height}x{width}.")
    maps = attention_maps(vit, expected["image"])
    assert_agree(maps.flatten(2), expected["last_attention"][:, :, 0, 1:])
    assert torch.equal(mass_mask(maps)[0], expected["mask60"])
