"""Images resized to complete patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino.data.images.decode import to_tensor
from dino.data.images.patch_grid import patch_multiples, resize_to_patches
from dino.files import UserError


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    patch=st.integers(1, 32),
    extra=st.integers(0, 400),
    keep_aspect=st.booleans(),
)
def test_sides_are_the_nearest_multiples(
    height: int, width: int, patch: int, extra: int, keep_aspect: bool
) -> None:
    size = patch + extra
    sides = patch_multiples(height, width, size, patch, keep_aspect)
    assert [side % patch for side in sides] == [0, 0]
    shorter = min(height, width)
    for side, original in zip(sides, (height, width), strict=True):
        exact = size * min(original / shorter, 8) if keep_aspect else size
        assert abs(side - exact) <= patch / 2
        assert side > 0


def test_known_sizes() -> None:
    assert patch_multiples(480, 854, 480, 16, True) == (480, 848)
    assert patch_multiples(480, 854, 480, 16, False) == (480, 480)
    assert patch_multiples(300, 200, 102, 8, True) == (152, 104)
    with pytest.raises(UserError, match="--size 7 holds no patch of 8 px"):
        patch_multiples(10, 10, 7, 8, True)


def test_pictures_and_tensors_agree_and_nothing_is_cropped() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    pixels[:, :9], pixels[:, -9:] = 0, 255
    picture = Image.fromarray(pixels)
    found = resize_to_patches(picture, 20, 4, True)
    assert found.shape == (3, 20, 32)  # 30 is as near to 28 as to 32
    assert (found[..., 0] < 60).all()  # the left edge is at the left, and the right at the right
    assert (found[..., -1] > 195).all()
    other = resize_to_patches(to_tensor(picture), 20, 4, True)
    assert (found.int() - other.int()).abs().max() <= 1


def test_any_number_of_channels() -> None:
    levels = torch.randint(0, 256, (5, 17, 23), dtype=torch.uint8)
    found = resize_to_patches(levels, 16, 8, False)
    assert (found.shape, found.dtype) == ((5, 16, 16), torch.uint8)
