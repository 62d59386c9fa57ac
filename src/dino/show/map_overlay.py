"""Images of maps and masks, such as the attention of the CLS token (Figures 1, 3, 4).

The maps are those of `dino.models.attention`. Shapes: h w patches, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

ColorMap = Literal["viridis", "inferno"]

COLORS: dict[ColorMap, str] = {
    "viridis": "440154 47186a 472c7b 424085 3a528b 32628d 2c728e 26818e 20908c "
    "1e9f88 28ae7f 3ebc73 5ec961 83d34b addc30 d7e219 fde724",
    "inferno": "000003 0a0723 200c4a 3c0965 570f6d 70196e 892269 a32b61 bb3754 "
    "d14643 e45a31 f1721d f98e08 fbac10 f8cb34 f1e968 fcfea4",
}
"""Evenly spaced colours of matplotlib's maps; linear between them, at most 6 levels away."""


def colored(values: Float[Tensor, "h w"], colors: ColorMap) -> Image.Image:
    """A map as an image, a pixel for each patch: darkest where smallest, brightest where largest.

    Args:
        values: any finite numbers.
        colors: the colour map: the paper has viridis, its videos inferno.
    """
    numbers = values.double().cpu()
    low, high = numbers.min(), numbers.max()
    shares = ((numbers - low) / (high - low).clamp(min=1e-12)).numpy()
    table = np.array([list(bytes.fromhex(color)) for color in COLORS[colors].split()])
    places = np.linspace(0, 1, len(table))
    rgb = np.stack([np.interp(shares, places, channel) for channel in table.T], axis=-1)
    return Image.fromarray(rgb.round().astype(np.uint8))


def overlay(image: Image.Image, values: Float[Tensor, "h w"], strength: float = 0.6) -> Image.Image:
    """An image with a map over it.

    Args:
        image: the pixels that the map covers (complete patches only).
        values: the map.
        strength: of the map, from 0 (image only) to 1 (map only).
    """
    base = image.convert("RGB")
    sharp = colored(values, "inferno").resize(base.size, Image.Resampling.NEAREST)
    return Image.blend(base, sharp, strength)
