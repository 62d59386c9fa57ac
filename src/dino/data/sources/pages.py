"""Every page of TIFFs and every frame of DICOMs as an image of its own: `FOLDER?pages=all`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from dino.data.images.decode import OpenedImage, open_image, page_count
from dino.data.sources.base import Source
from dino.progress import bar

SUFFIX = "?pages=all"
"""Behind a folder or a list of stacks."""


class Pages(Source):
    """The pages of the images of another source, in its order; each has the label of its file.

    The header of every file is read when it is opened.
    """

    def __init__(self, files: Source) -> None:
        self._files, self.classes, self.left_out = files, files.classes, files.left_out
        counts = []
        with bar("pages", len(files)) as advance:
            for index in range(len(files)):
                counts.append(page_count(files.content(index), files.path(index)))
                advance(1)
        self._counts = np.array(counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        if files.labels is not None:
            self.labels = np.repeat(files.labels, self._counts).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> AbstractContextManager[OpenedImage]:
        """Image `index`; see `open_image`."""
        file, page = self._place(index)
        pixels = replace(self.pixels, page=page)
        return open_image(self._files.content(file), self.path(index), pixels)

    def path(self, index: int) -> str:
        """The image's file, and its page where there are several."""
        file, page = self._place(index)
        return self._files.path(file) + ("" if page is None else f", page {page}")

    def identity(self) -> Iterator[bytes]:
        """That of the files, and the number of their pages."""
        yield from self._files.identity()
        yield self._counts.tobytes()

    def _place(self, index: int) -> tuple[int, int | None]:
        """The number of the file and of its page, None for the only one."""
        index = range(len(self))[index]
        file = int(np.searchsorted(self._ends, index, side="right"))
        count = int(self._counts[file])
        return file, None if count == 1 else index - int(self._ends[file]) + count
