"""Images of maps and masks, such as the attention of the CLS token (Figures 1, 3, 4).

The maps are those of `dino.models.attention`. Patches are enlarged by nearest neighbours.
Shapes: n maps, h w patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from dino.data.images.highlight import dimmed, highlighted

ColorMap = Literal["viridis", "inferno"]

COLORS: dict[ColorMap, str] = {
    "viridis": "440154 47186a 472c7b 424085 3a528b 32628d 2c728e 26818e 20908c "
    "1e9f88 28ae7f 3ebc73 5ec961 83d34b addc30 d7e219 fde724",
    "inferno": "000003 0a0723 200c4a 3c0965 570f6d 70196e 892269 a32b61 bb3754 "
    "d14643 e45a31 f1721d f98e08 fbac10 f8cb34 f1e968 fcfea4",
}
"""Evenly spaced colours of matplotlib's maps; linear between them, at most 6 levels away."""

Color: TypeAlias = tuple[int, int, int]

CATEGORIES: tuple[Color, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
"""Colours that the colour-blind can distinguish (Okabe and Ito 2008), without black."""

OPAQUE = 0.85
"""Largest opacity of a colour over an image."""


Span: TypeAlias = tuple[float, float] | None
"""The values shown darkest and brightest; None for the smallest and the largest of a map."""


def colored(values: Float[Tensor, "h w"], colors: ColorMap, span: Span = None) -> Image.Image:
    """A map as an image, a pixel for each patch: darkest where smallest, brightest where largest.

    Args:
        values: any finite numbers.
        colors: the colour map: the paper has viridis, its videos inferno.
        span: the same for several maps makes them comparable.
    """
    numbers = values.double().cpu().numpy()
    low, high = (numbers.min(), numbers.max()) if span is None else span
    shares = (numbers - low) / max(high - low, 1e-12)
    table = np.array([list(bytes.fromhex(color)) for color in COLORS[colors].split()])
    places = np.linspace(0, 1, len(table))
    rgb = np.stack([np.interp(shares, places, channel) for channel in table.T], axis=-1)
    return Image.fromarray(rgb.round().astype(np.uint8))


def overlay(
    image: Image.Image, values: Float[Tensor, "h w"], strength: float = 0.6, span: Span = None
) -> Image.Image:
    """An image with a map over it.

    Args:
        image: the pixels that the map covers (complete patches only).
        values: the map.
        strength: of the map, from 0 (image only) to 1 (map only).
        span: see `colored`.
    """
    base = image.convert("RGB")
    sharp = colored(values, "inferno", span).resize(base.size, Image.Resampling.NEAREST)
    return Image.blend(base, sharp, strength)


def cut_out(image: Image.Image, mask: Bool[Tensor, "h w"]) -> Image.Image:
    """An image within a mask of patches, dim and grey elsewhere."""
    return highlighted(image, stencil(mask, image.size))


def stencil(mask: Bool[Tensor, "h w"], size: tuple[int, int]) -> Image.Image:
    """A mask of patches as an image of this width and height, white (255) inside, black outside."""
    pixels = mask.cpu().numpy().astype(np.uint8) * 255
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def outlined(image: Image.Image, mask: Bool[Tensor, "h w"]) -> Image.Image:
    """An image with a white line inside of the border of a mask of patches, black beside it."""
    inside = np.asarray(stencil(mask, image.size)) > 0
    width = max(1, round(min(image.size) / 200))
    line, pixels = inside & ~_shrunk(inside, width), np.array(image.convert("RGB"))
    pixels[_shrunk(inside, width) & ~_shrunk(inside, 2 * width)] = 0
    pixels[line] = 255
    return Image.fromarray(pixels)


def _shrunk(inside: Bool[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """Without a border of this many pixels; the border of the image is none."""
    padded = np.pad(inside, width, mode="edge")
    rows, columns = inside.shape
    result = inside.copy()
    for shift in (0, 2 * width):
        result &= padded[shift : shift + rows, width : width + columns]
        result &= padded[width : width + rows, shift : shift + columns]
    return result


def composite(
    image: Image.Image,
    maps: Float[Tensor, "n h w"],
    masks: Bool[Tensor, "n h w"],
    colors: Sequence[Color],
) -> Image.Image:
    """A colour for each map, over a dim and grey image (Fig. 3).

    A patch has the colour of the map that is largest there relative to its own maximum, among the
    maps whose mask holds the patch; its opacity grows with the root of this ratio.
    """
    ratios = maps.cpu() / maps.amax(dim=(1, 2), keepdim=True).cpu().clamp(min=1e-12)
    opacity, winner = (ratios * masks.cpu()).sqrt().max(dim=0)
    levels = Image.fromarray((opacity * 255 * OPAQUE).round().to(torch.uint8).numpy())
    rgb = Image.fromarray(np.array(colors, dtype=np.uint8)[winner.numpy()])
    nearest = Image.Resampling.NEAREST
    return Image.composite(
        rgb.resize(image.size, nearest), dimmed(image), levels.resize(image.size, nearest)
    )


def ringed(image: Image.Image, x: float, y: float) -> Image.Image:
    """An image with a ring around the point x, y, white on black."""
    radius, result = max(4, round(min(image.size) / 40)), image.convert("RGB")
    draw = ImageDraw.Draw(result)
    for color, width in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        grown = radius + width // 2
        box = (x - grown, y - grown, x + grown, y + grown)
        draw.ellipse(box, outline=color, width=max(1, radius * width // 8))
    return result
