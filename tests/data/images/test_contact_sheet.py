"""Contact sheets: pictures complete, not enlarged and at their places, captions inside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dino.data.images.contact_sheet import (
    FRAMES,
    LINE,
    MARGIN,
    TEXT,
    Cell,
    Frame,
    _fitted,
    _wrapped,
    contact_sheet,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def where(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what has this colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(axis=2))
    left, top = columns.min(), rows.min()
    return int(left), int(top), int(columns.max() - left + 1), int(rows.max() - top + 1)


def test_pictures_lie_in_rows_shrunk_and_centred() -> None:
    large, small = Image.new("RGB", (400, 200), RED), Image.new("RGB", (10, 10), BLUE)
    plain = Cell(Image.new("L", (5, 5)))
    sheet = contact_sheet([[plain, Cell(large)], [Cell(small)]], tile=100)
    assert sheet.size == (2 * (100 + MARGIN) + MARGIN,) * 2
    assert where(sheet, RED) == (2 * MARGIN + 100, MARGIN + 25, 100, 50)
    assert where(sheet, BLUE) == (MARGIN + 45, 2 * MARGIN + 100 + 45, 10, 10)
    assert large.size == (400, 200)


def test_captions_have_lines_below_the_picture() -> None:
    red = Image.new("RGB", (100, 100), RED)
    bare = contact_sheet([[Cell(red)]], tile=100)
    sheet = contact_sheet([[Cell(red, "one\ntwo")], [Cell(red)]], tile=100)
    assert sheet.size == (bare.width, 2 * (100 + 2 * LINE + MARGIN) + MARGIN)
    below = np.asarray(sheet)[MARGIN + 100 : MARGIN + 100 + 2 * LINE]
    assert (below[:LINE] < 128).any()
    assert (below[LINE:] < 128).any()
    assert (below[:, :MARGIN] == 255).all()


def test_compact_rows_are_as_high_as_their_highest_picture() -> None:
    wide, high = Image.new("RGB", (400, 200), RED), Image.new("RGB", (10, 90), BLUE)
    sheet = contact_sheet([[Cell(wide, "one")], [Cell(wide), Cell(high)]], tile=100, compact=True)
    assert sheet.height == MARGIN + 50 + LINE + MARGIN + 90 + LINE + MARGIN
    assert where(sheet, BLUE) == (2 * MARGIN + 100 + 45, 2 * MARGIN + 50 + LINE, 10, 90)
    below = np.asarray(sheet)[MARGIN + 50 : MARGIN + 50 + LINE]
    assert (below < 128).any()  # the caption


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_marks(frame: Frame) -> None:
    """Around the picture, none of which it hides; dashes are half of the line."""
    red = Image.new("RGB", (50, 100), RED)
    plain, marked = (contact_sheet([[Cell(red, frame=f)]], tile=100) for f in (None, frame))
    assert where(plain, RED) == where(marked, RED)
    color, dashed = FRAMES[frame]
    changed = (np.asarray(plain) != np.asarray(marked)).any(axis=2)
    assert (np.asarray(marked)[changed] == color).all()
    length = 2 * (56 + 106 - 4)
    assert changed.sum() == pytest.approx(2 * length * (0.5 if dashed else 1), rel=0.1)


def test_a_long_title_is_broken_into_lines() -> None:
    red = Image.new("RGB", (100, 100), RED)
    short, long = (contact_sheet([[Cell(red)] * 2], 100, t) for t in ("one", "two words " * 20))
    assert short.width == long.width
    lines = (long.height - short.height) / LINE + 1
    assert lines == int(lines) > 3
    head = np.asarray(long)[: int(lines) * LINE + MARGIN]
    assert (head[:, -MARGIN:] == 255).all()  # nothing is cut off
    font = ImageFont.load_default(TEXT)
    wrapped = _wrapped("two words " * 20, 206, font)
    assert len(wrapped) == lines
    assert " ".join(wrapped) == ("two words " * 20).strip()
    assert max(map(font.getlength, wrapped)) <= 206
    assert _wrapped("", 206, font) == []


@pytest.mark.parametrize("length", [5, 60, 400])
def test_long_captions_keep_their_ends(length: int) -> None:
    font = ImageFont.load_default(TEXT)
    line = "start" + "-" * length + "0001.jpg"
    fitted = _fitted(line, 144, font)
    assert font.getlength(fitted) <= 144
    assert fitted == line or (fitted[:3] == "sta" and fitted[-8:] == "0001.jpg" and "..." in fitted)
    assert (fitted == line) == (length == 5)


def test_frames_of_all_sizes_are_drawn() -> None:
    for side in range(1, 40):
        contact_sheet([[Cell(Image.new("RGB", (side, side)), frame="wrong")]], tile=40)
