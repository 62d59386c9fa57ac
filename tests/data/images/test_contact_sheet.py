"""Contact sheets: pictures complete, not enlarged and at their places, captions inside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dino.data.images.contact_sheet import LINE, MARGIN, TEXT, Cell, _fitted, contact_sheet

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


def test_a_frame_marks() -> None:
    red = Image.new("RGB", (50, 100), RED)
    plain, marked = (contact_sheet([[Cell(red, marked=m)]], tile=100) for m in (False, True))
    assert where(plain, RED) == where(marked, RED)
    assert (np.asarray(plain) != np.asarray(marked)).any(axis=2).sum() > 2 * (50 + 100)


@pytest.mark.parametrize("length", [5, 60, 400])
def test_long_captions_keep_their_ends(length: int) -> None:
    font = ImageFont.load_default(TEXT)
    line = "start" + "-" * length + "0001.jpg"
    fitted = _fitted(line, 144, font)
    assert font.getlength(fitted) <= 144
    assert fitted == line or (fitted[:3] == "sta" and fitted[-8:] == "0001.jpg" and "..." in fitted)
    assert (fitted == line) == (length == 5)
