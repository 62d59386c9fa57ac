"""Pictures of components and parts, as a basis gives them, and what their colours mean.

Shapes: h w patches.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image

from dino.data.images.highlight import dimmed
from dino.data.images.map_overlay import CATEGORIES, stencil
from dino.show.legends import below, swatches

STRENGTH = 0.7
"""Of the colours of parts over an image, from 0 to 1."""


def component_picture(
    picture: Image.Image,
    colors: UInt8[np.ndarray, "h w 3"],
    foreground: Bool[np.ndarray, "h w"] | None = None,
) -> Image.Image:
    """The colours of patches at the size of a picture; the background is the picture, dim, grey."""
    large = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    return _within(foreground, large, picture)


def part_picture(
    picture: Image.Image,
    parts: UInt8[np.ndarray, "h w"],
    foreground: Bool[np.ndarray, "h w"] | None = None,
) -> Image.Image:
    """The parts of a picture, numbered from 0, in the colours of `CATEGORIES` over it."""
    colors = np.array(CATEGORIES, dtype=np.uint8)[parts]
    flat = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    large = Image.blend(picture.convert("L").convert("RGB"), flat, STRENGTH)
    return _within(foreground, large, picture)


def _within(
    foreground: Bool[np.ndarray, "h w"] | None, colored: Image.Image, picture: Image.Image
) -> Image.Image:
    if foreground is None:
        return colored
    mask = stencil(torch.from_numpy(foreground), picture.size)
    return Image.composite(colored, dimmed(picture), mask)


def with_legend(picture: Image.Image, parts: int, letters: int) -> Image.Image:
    """A picture with the colours of so many parts below it, in letters of this height."""
    colors = {f"{number + 1}": CATEGORIES[number] for number in range(parts)}
    return below(picture, swatches("part", colors, letters)) if parts else picture
