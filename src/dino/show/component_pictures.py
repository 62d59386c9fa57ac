"""Pictures of components and parts, as a basis gives them, with what their colours mean.

Shapes: h w patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFont

from dino.data.images.contact_sheet import INK, PAPER, TEXT

PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#000000")
"""Colours of parts, which readers with any colour vision tell apart (Okabe and Ito, 2008)."""

STRENGTH = 0.7
"""Of the colours of parts over an image, from 0 to 1."""

DIM = 0.25
"""Brightness of the background, which is grey, from 0 to 1."""

SWATCH, GAP = 14, 8
"""Side of a coloured square of a legend, and space around it, in pixels."""


def component_picture(
    picture: Image.Image,
    colors: UInt8[np.ndarray, "h w 3"],
    foreground: Bool[np.ndarray, "h w"] | None = None,
) -> Image.Image:
    """Colours of patches, enlarged to the picture; the background is the picture, dim and grey."""
    large = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    return large if foreground is None else _on_dim(picture, large, foreground)


def part_picture(
    picture: Image.Image,
    parts: UInt8[np.ndarray, "h w"],
    foreground: Bool[np.ndarray, "h w"] | None = None,
) -> Image.Image:
    """The parts of a picture, numbered from 0, in the colours of the palette over it."""
    palette = np.array([ImageColor.getrgb(color) for color in PALETTE], dtype=np.uint8)
    flat = Image.fromarray(palette[parts]).resize(picture.size, Image.Resampling.NEAREST)
    grey = picture.convert("L").convert("RGB")
    large = Image.blend(grey, flat, STRENGTH)
    return large if foreground is None else _on_dim(picture, large, foreground)


def with_legend(picture: Image.Image, parts: int) -> Image.Image:
    """A picture with the colours of so many parts below it."""
    legend = _legend([f"part {number + 1}" for number in range(parts)], picture.width)
    joined = Image.new("RGB", (picture.width, picture.height + legend.height), PAPER)
    joined.paste(picture, (0, 0))
    joined.paste(legend, (0, picture.height))
    return joined


def _on_dim(
    picture: Image.Image, colored: Image.Image, foreground: Bool[np.ndarray, "h w"]
) -> Image.Image:
    dim = ImageEnhance.Brightness(picture.convert("L").convert("RGB")).enhance(DIM)
    stencil = Image.fromarray(foreground.astype(np.uint8) * 255)
    return Image.composite(colored, dim, stencil.resize(picture.size, Image.Resampling.NEAREST))


def _legend(names: Sequence[str], width: int) -> Image.Image:
    """Squares of the palette with their names, in as many lines as the width needs."""
    font = ImageFont.load_default(TEXT)
    places, x, y = [], GAP, GAP
    for name in names:
        step = SWATCH + GAP // 2 + round(font.getlength(name)) + GAP
        if x + step > width and x > GAP:
            x, y = GAP, y + SWATCH + GAP
        places.append((x, y))
        x += step
    strip = Image.new("RGB", (width, y + SWATCH + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    for name, color, (x, y) in zip(names, PALETTE, places, strict=False):
        draw.rectangle((x, y, x + SWATCH - 1, y + SWATCH - 1), color, INK)
        place = (x + SWATCH + GAP // 2, y + SWATCH // 2)
        draw.text(place, name, INK, font, anchor="lm")
    return strip
