"""Masks of the attention's mass against the reference's."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_set import manifest, part, tensors

from dino.models.attention import mass_mask

CONFIG = manifest()["config"]
SIZES = [tuple(size) for size in CONFIG["input_sizes"]]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_golden_mass_mask(height: int, width: int) -> None:
    golden = part(tensors("vit.safetensors"), f"{height}x{width}.")
    grid = (height // CONFIG["patch_size"], width // CONFIG["patch_size"])
    maps = golden["last_attention"][:, :, 0, 1:].unflatten(2, grid)
    assert torch.equal(mass_mask(maps)[0], golden["mask60"])
