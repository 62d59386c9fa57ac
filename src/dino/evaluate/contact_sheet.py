"""Contact sheets of images that an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino.data.images.contact_sheet import Cell, contact_sheet
from dino.data.images.decode import as_picture
from dino.data.sources.open import Source
from dino.files import replacing


class Pictures:
    """The pictures of a source by what it calls them: tables leave out those that are damaged."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.number = {source.path(index): index for index in range(len(source))}

    def cell(self, path: str, words: str, *, marked: bool = False) -> Cell:
        """A cell of a sheet with the file's name above `words`."""
        picture = as_picture(self.source[self.number[path]])
        return Cell(picture, f"{Path(path).name}\n{words}", marked)


def save_sheet(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """Write a contact sheet as PNG, whole or not at all."""
    with replacing(path) as temporary:
        contact_sheet(rows).save(temporary, "PNG")
