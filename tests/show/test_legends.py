"""Legends: the colours of the pictures, complete, and beside them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dino.data.images.contact_sheet import PAPER
from dino.data.images.map_overlay import COLORS
from dino.show.legends import below, color_bar, inside, letters_for, strip_height, swatches

ORANGE, BLUE = (230, 159, 0), (86, 180, 233)


def columns_of(strip: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """The columns in which the colour occurs."""
    return np.flatnonzero((np.asarray(strip) == color).all(axis=2).any(axis=0))


@pytest.mark.parametrize("letters", [12, 30])
def test_a_bar_goes_from_low_to_high_between_its_labels(letters: int) -> None:
    bar = color_bar("0 %", "3 %", letters)
    assert bar.height == strip_height(letters)
    first, last = (tuple(bytes.fromhex(COLORS["inferno"].split()[i])) for i in (0, -1))
    left, right = columns_of(bar, first), columns_of(bar, last)
    assert left.max() < right.min()
    ink = (np.asarray(bar).max(axis=2) < 128).any(axis=0)
    assert ink[: left.min()].any()  # a label on each side
    assert ink[right.max() + 1 :].any()


def test_every_label_stands_behind_its_color() -> None:
    strip = swatches("heads", {"3": ORANGE, "11": BLUE}, 12)
    first, second = columns_of(strip, ORANGE), columns_of(strip, BLUE)
    assert len(first) == len(second) == 12
    ink = np.flatnonzero((np.asarray(strip).max(axis=2) < 128).any(axis=0))
    assert (ink < first.min()).any()
    assert ((ink > first.max()) & (ink < second.min())).any()
    assert (ink > second.max()).any()
    assert (np.asarray(strip)[:, -1] == PAPER[0]).all()  # nothing is cut off


def test_below_keeps_every_pixel_of_both() -> None:
    picture, legend = Image.new("RGB", (20, 10), ORANGE), Image.new("RGB", (30, 8), BLUE)
    found = below(picture, legend)
    assert found.size == (30, 18)
    assert columns_of(found, ORANGE).tolist() == list(range(5, 25))
    assert (np.asarray(found)[10:] == BLUE).all()


def test_inside_keeps_the_size_and_needs_room() -> None:
    picture, legend = Image.new("RGB", (40, 30), ORANGE), Image.new("RGB", (20, 8), BLUE)
    found = np.asarray(inside(picture, legend))
    assert (found[22:, :20] == BLUE).all()
    assert (found[:22] == ORANGE).all()
    assert (found[:, 20:] == ORANGE).all()
    small = Image.new("RGB", (19, 30), ORANGE)
    assert inside(small, legend).tobytes() == small.tobytes()


def test_letters_grow_with_the_picture() -> None:
    assert [letters_for(width) for width in (64, 600, 4000)] == [12, 12, 80]
