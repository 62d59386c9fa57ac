"""Legends of pictures: a colour bar, and labelled colours, as strips of text and colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from dino.data.images.contact_sheet import INK, PAPER, TEXT
from dino.data.images.map_overlay import Color, colored


def letters_for(width: int) -> int:
    """Height of the letters of a legend in a picture of this width, in pixels."""
    return max(TEXT, width // 50)


def strip_height(letters: int) -> int:
    """Height of a legend in pixels."""
    return 2 * letters


def color_bar(low: str, high: str, letters: int) -> Image.Image:
    """The colours of overlays, between labels of the smallest and the largest value."""
    shares = torch.linspace(0, 1, 7 * letters).expand(letters, -1)
    return _strip([low, colored(shares, "inferno"), high], letters)


def swatches(title: str, colors: Mapping[str, Color], letters: int) -> Image.Image:
    """A title, and labels behind squares of their colours."""
    items: list[str | Image.Image] = [title]
    for label, color in colors.items():
        items += [Image.new("RGB", (letters, letters), color), label]
    return _strip(items, letters)


def gradients(colors: Mapping[str, tuple[Color, Color]], letters: int) -> Image.Image:
    """Labels, and behind each the colours from one end to the other."""
    items: list[str | Image.Image] = []
    for label, (low, high) in colors.items():
        first, last = (Image.new("RGB", (5 * letters, letters), color) for color in (low, high))
        ramp = Image.linear_gradient("L").rotate(90).resize(first.size)
        items += [label, Image.composite(last, first, ramp)]
    return _strip(items, letters)


def _strip(items: Sequence[str | Image.Image], letters: int) -> Image.Image:
    """Texts and pictures side by side, on white."""
    font, gap = ImageFont.load_default(letters), letters // 3
    widths = [
        item.width if isinstance(item, Image.Image) else round(font.getlength(item))
        for item in items
    ]
    size = (sum(widths) + gap * (len(items) + 1), strip_height(letters))
    strip = Image.new("RGB", size, PAPER)
    draw, x = ImageDraw.Draw(strip), gap
    for item, width in zip(items, widths, strict=True):
        if isinstance(item, Image.Image):
            strip.paste(item, (x, (strip.height - item.height) // 2))
        else:
            draw.text((x, strip.height // 2), item, INK, font, anchor="lm")
        x += width + gap
    return strip


def below(picture: Image.Image, legend: Image.Image) -> Image.Image:
    """A picture with its legend below it, on white; as wide as the wider of both."""
    size = (max(picture.width, legend.width), picture.height + legend.height)
    result = Image.new("RGB", size, PAPER)
    result.paste(picture, ((size[0] - picture.width) // 2, 0))
    result.paste(legend, ((size[0] - legend.width) // 2, picture.height))
    return result


def inside(picture: Image.Image, legend: Image.Image) -> Image.Image:
    """A picture of the same size with its legend in the lower left corner, where it fits."""
    result = picture.copy()
    if legend.width <= picture.width and legend.height <= picture.height:
        result.paste(legend, (0, picture.height - legend.height))
    return result
