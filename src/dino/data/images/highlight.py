"""What a picture shows, in its colours, while the rest is dim and grey."""

from __future__ import annotations

from PIL import Image, ImageEnhance

DIM = 0.35
"""Brightness of a picture outside of what is shown."""


def dimmed(picture: Image.Image) -> Image.Image:
    """A picture in grey and dark."""
    return ImageEnhance.Brightness(picture.convert("L").convert("RGB")).enhance(DIM)


def highlighted(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture inside of a mask (255) of its size; `dimmed` outside (0)."""
    return Image.composite(picture.convert("RGB"), dimmed(picture), mask)
