"""Contact sheets of images that were found by their features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dino.data.images.contact_sheet import Cell, Frame, contact_sheet
from dino.data.images.decode import as_picture
from dino.data.images.png import save_picture
from dino.data.sources.open import Source

SHEET = (12, 8)
"""Most queries, and neighbours of each, on a contact sheet."""


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - links stay as they are, a million times


class ImagesByPath:
    """The images of a source by their paths, relative or absolute.

    Feature tables lack damaged images, so that a row is no index into the source.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = {_absolute(source.path(index)): index for index in range(len(source))}

    def cell(self, path: str, caption: str, frame: Frame | None = None) -> Cell:
        """A cell of a sheet with the file's name above `caption`."""
        picture = as_picture(self.source[self.index[_absolute(path)]])
        return Cell(picture, f"{Path(path).name}\n{caption}", frame)

    def class_name(self, path: str) -> str:
        """The image's class; "" where there are no classes."""
        return self.source.class_name(self.index[_absolute(path)])

    def size(self, path: str) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        with self.source.open(self.index[_absolute(path)]) as image:
            return image.size


def save_sheet(
    path: Path, rows: Sequence[Sequence[Cell]], title: str, tile: int = 144, compact: bool = False
) -> None:
    """Write a contact sheet as PNG, atomically."""
    save_picture(contact_sheet(rows, tile, title, compact), path)


def neighbour_rows(
    database: Source,
    queries: Source | None,
    paths: Sequence[str],
    neighbours: Sequence[Sequence[tuple[str, float]]],
) -> tuple[list[list[Cell]], str]:
    """The rows and the title of a contact sheet of queries and their neighbours.

    Args:
        database: where neighbours were searched.
        queries: the images that were looked up; None for those of the database.
        paths: of the queries.
        neighbours: the path and similarity of each query's neighbours.
    """
    searched = ImagesByPath(database)
    query_images = searched if queries is None else ImagesByPath(queries)
    count = min(SHEET[0], len(neighbours))
    rows, labelled = [], False
    for row in (len(neighbours) * i // count for i in range(count)):  # evenly spread
        name = query_images.class_name(paths[row])
        cells = [query_images.cell(paths[row], f"query {name}".strip(), "plain")]
        for path, similarity in neighbours[row][: SHEET[1]]:
            other = searched.class_name(path)
            frame: Frame | None = None
            if name and other:
                labelled, frame = True, "right" if other == name else "wrong"
            cells.append(searched.cell(path, f"{similarity:.3f} {other}".strip(), frame))
        rows.append(cells)
    title = (
        f"Nearest neighbours of {count} of {len(neighbours):,} queries, evenly spread, among "
        f"{len(database):,} images, the most similar first. Left: the query. Numbers: cosine "
        "similarity."
    )
    if labelled:
        title += " Solid green frame: the query's class; dashed orange frame: another class."
    return rows, title
