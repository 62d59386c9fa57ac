"""Contact sheets of images that an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino.data.images.contact_sheet import Cell, Frame, contact_sheet
from dino.data.images.decode import as_picture
from dino.data.sources.open import Source
from dino.files import replacing


class ImagesByPath:
    """The images of a source by their paths, since feature tables lack the damaged ones."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = {source.path(index): index for index in range(len(source))}

    def cell(self, path: str, caption: str, frame: Frame | None = None) -> Cell:
        """A cell of a sheet with the file's name above `caption`."""
        picture = as_picture(self.source[self.index[path]])
        return Cell(picture, f"{Path(path).name}\n{caption}", frame)

    def class_name(self, path: str) -> str:
        """The image's class; "" where there are no classes."""
        return self.source.class_name(self.index[path])

    def size(self, path: str) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        with self.source.open(self.index[path]) as image:
            return image.size


def save_sheet(
    path: Path, rows: Sequence[Sequence[Cell]], title: str, tile: int = 144, compact: bool = False
) -> None:
    """Write a contact sheet as PNG, atomically."""
    with replacing(path) as temporary:
        contact_sheet(rows, tile, title, compact).save(temporary, "PNG")
