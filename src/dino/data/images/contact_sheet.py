"""Contact sheets: rows of small pictures with captions, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import Image, ImageDraw, ImageFont

MARGIN, TEXT, LINE = 6, 12, 16
"""Space around pictures, height of letters, height of a line of a caption, in pixels."""

INK, PAPER = (40, 40, 40), (255, 255, 255)

Frame: TypeAlias = Literal["plain", "right", "wrong"]
FRAMES: dict[Frame, tuple[tuple[int, int, int], bool]] = {
    "plain": (INK, False),
    "right": ((28, 122, 67), False),
    "wrong": ((190, 90, 0), True),
}
"""Colour of each frame, and whether it is dashed, so that they differ without colours too."""

DASH = 8
"""Length of a dash, and of the gap after it, in pixels."""


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet.

    Attributes:
        picture: of any size; shrunk into the tile, never enlarged.
        caption: lines below it; of a line that is too long the middle is left out.
        frame: around the picture; None for none.
    """

    picture: Image.Image
    caption: str = ""
    frame: Frame | None = None


def contact_sheet(
    rows: Sequence[Sequence[Cell]], tile: int = 144, title: str = "", compact: bool = False
) -> Image.Image:
    """Rows (of any lengths) with one or more cells, and a title on top, as an RGB picture on white.

    Each picture is at the centre of a square of side `tile`, in pixels; with `compact` a row is
    only as high as its highest picture. The title is broken into lines of the sheet's width.
    """
    pictures = [[_shrunk(cell.picture, tile) for cell in row] for row in rows]
    heights = [max(one.height for one in row) if compact and row else tile for row in pictures]
    lines = max(len(cell.caption.splitlines()) for row in rows for cell in row)
    below = lines * LINE + MARGIN
    width = max(len(row) for row in rows) * (tile + MARGIN) + MARGIN
    font = ImageFont.load_default(TEXT)
    titles = _wrapped(title, width - 2 * MARGIN, font)
    top = MARGIN + len(titles) * LINE + MARGIN * bool(titles)
    sheet = Image.new("RGB", (width, top + sum(heights) + len(rows) * below), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(titles):
        draw.text((MARGIN, MARGIN + number * LINE), line, INK, font)
    for row, shrunk, height in zip(rows, pictures, heights, strict=True):
        for along, (cell, small) in enumerate(zip(row, shrunk, strict=True)):
            left = MARGIN + along * (tile + MARGIN)
            x, y = left + (tile - small.width) // 2, top + (height - small.height) // 2
            sheet.paste(small, (x, y))
            if cell.frame is not None:
                _draw_frame(
                    draw, (x - 3, y - 3, x + small.width + 2, y + small.height + 2), cell.frame
                )
            for number, line in enumerate(cell.caption.splitlines()):
                place = (left + tile // 2, top + height + number * LINE + LINE // 2)
                draw.text(place, _fitted(line, tile, font), INK, font, anchor="mm")
        top += height + below
    return sheet


def _shrunk(picture: Image.Image, tile: int) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    return small


def _draw_frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], frame: Frame) -> None:
    """A rectangle of two pixels inside `box` (left, top, right, bottom)."""
    color, dashed = FRAMES[frame]
    draw.rectangle(box, outline=color, width=2)
    if dashed:
        left, top, right, bottom = box
        for x in range(left + DASH, right - 2, 2 * DASH):
            for y in (top, bottom - 1):
                draw.rectangle((x, y, min(x + DASH, right - 2) - 1, y + 1), PAPER)
        for y in range(top + DASH, bottom - 2, 2 * DASH):
            for x in (left, right - 1):
                draw.rectangle((x, y, x + 1, min(y + DASH, bottom - 2) - 1), PAPER)


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """The text in lines of this width; a word that is too long has its own line."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fitted(line, width, font) for line in lines]


def _fitted(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The line, or its beginning and its end, in which file names differ."""
    if font.getlength(line) <= width:
        return line
    for length in range(len(line) - 1, 0, -1):
        short = f"{line[: length // 3]}...{line[len(line) - (length - length // 3) :]}"
        if font.getlength(short) <= width:
            return short
    return ""
