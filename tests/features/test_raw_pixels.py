"""Raw pixels as features."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.sources.open import open_source
from dino.features.raw_pixels import raw_pixels


def normalized(values: Tensor) -> Tensor:
    """Values [3, S, S] from 0 to 1 as networks get them, flattened."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((values - mean[:, None, None]) / std[:, None, None]).flatten()


def test_raw_pixels_are_the_resized_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    flat = np.full((10, 30, 3), 51, dtype=np.uint8)
    table = raw_pixels(open_source([Image.fromarray(noise), Image.fromarray(flat)]), size=4)
    assert table.labels is None
    expected = normalized(torch.from_numpy(noise).permute(2, 0, 1) / 255)
    torch.testing.assert_close(table.features[0], expected)
    torch.testing.assert_close(table.features[1], normalized(torch.full((3, 4, 4), 0.2)))


def test_pixels_of_tensors() -> None:
    white = torch.full((3, 6, 9), 255, dtype=torch.uint8)
    found = raw_pixels(open_source([white]), size=2).features[0]
    torch.testing.assert_close(found, normalized(torch.ones(3, 2, 2)))
