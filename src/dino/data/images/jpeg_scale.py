"""JPEGs at a reduced scale: by how much, and the boxes of crops in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

SPARE = 2.0
"""Pixels of a reduced image, at least, for each pixel of a view cut from it."""

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def reduction(boxes: Sequence[Box], sizes: Sequence[int]) -> int:
    """The largest factor, 1, 2, 4 or 8, by which an image may be decoded smaller.

    Every crop keeps `SPARE` times the pixels of its view along either axis, so that resizing still
    averages over what the smaller decoding has lost. Measured on photographs, views then differ
    from those of the full image by half a level of 255 on average
    (`tests/data/images/test_jpeg_scale.py` states the bound).

    Args:
        boxes: the crops, in pixels of the full image.
        sizes: side of each view in pixels.
    """
    pairs = zip(boxes, sizes, strict=True)
    largest = min(min(box[2:]) / (SPARE * size) for box, size in pairs)
    return next(factor for factor in (8, 4, 2, 1) if factor <= largest or factor == 1)


def reduced_box(box: Box, factor: int, height: int, width: int) -> Box:
    """The nearest box in the `height` x `width` pixels of an image decoded at 1 / `factor`."""
    rows, columns = (max(1, round(length / factor)) for length in box[2:])
    top, left = (round(place / factor) for place in box[:2])
    return min(top, height - rows), min(left, width - columns), rows, columns
