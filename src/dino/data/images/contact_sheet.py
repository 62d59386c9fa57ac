"""Contact sheets: rows of small pictures with captions, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MARGIN, TEXT, LINE = 6, 12, 16
"""Space around pictures, height of letters, height of a line of a caption, in pixels."""

INK, PAPER = (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet.

    Attributes:
        picture: of any size; shrunk into the tile, never enlarged.
        caption: lines below it; of a line that is too long the middle is left out.
        marked: whether it has a frame.
    """

    picture: Image.Image
    caption: str = ""
    marked: bool = False


def contact_sheet(rows: Sequence[Sequence[Cell]], tile: int = 144, title: str = "") -> Image.Image:
    """Rows (of any lengths) with one or more cells, and a line on top, as an RGB picture on white.

    Each picture is at the centre of a square of side `tile`, in pixels.
    """
    lines = max(len(cell.caption.splitlines()) for row in rows for cell in row)
    step = (tile + MARGIN, tile + lines * LINE + MARGIN)
    width = max(len(row) for row in rows) * step[0] + MARGIN
    head = MARGIN + (LINE + MARGIN) * bool(title)
    sheet = Image.new("RGB", (width, len(rows) * step[1] + head), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    draw.text((MARGIN, MARGIN), title, INK, font)
    for down, row in enumerate(rows):
        for along, cell in enumerate(row):
            left, top = MARGIN + along * step[0], head + down * step[1]
            small = cell.picture.convert("RGB")
            small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
            x, y = left + (tile - small.width) // 2, top + (tile - small.height) // 2
            sheet.paste(small, (x, y))
            if cell.marked:
                box = (x - 3, y - 3, x + small.width + 2, y + small.height + 2)
                draw.rectangle(box, outline=INK, width=2)
            for number, line in enumerate(cell.caption.splitlines()):
                place = (left + tile // 2, top + tile + number * LINE + LINE // 2)
                draw.text(place, _fitted(line, tile, font), INK, font, anchor="mm")
    return sheet


def _fitted(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The line, or its beginning and its end, in which file names differ."""
    if font.getlength(line) <= width:
        return line
    for length in range(len(line) - 1, 0, -1):
        short = f"{line[: length // 3]}...{line[len(line) - (length - length // 3) :]}"
        if font.getlength(short) <= width:
            return short
    return ""
