"""Image files by name: many paths in little memory, shared by all worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.decode import Reduce, Sample, read_image, read_values
from dino.data.formats import RGB, PixelFormat


class Names(Sequence[str]):
    """An immutable list of strings in two arrays.

    A Python list of a million strings is copied into every worker page by page, since reading a
    string writes its reference count; these arrays stay shared, and pickle in an instant.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """String `index`, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # negative indices, and IndexError beyond the end
        start = int(self._ends[position - 1]) if position else 0
        return os.fsdecode(self._bytes[start : int(self._ends[position])].tobytes())


class Files:
    """Images that lie in files: what the sources of files have in common.

    Args:
        root: folder that relative names start from.
        names: of the files, in the order of the source.

    Attributes:
        pixels: channels and range expected of them.
    """

    pixels: PixelFormat = RGB

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root = root
        self._names = Names(names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """Read image `index`; raises `ImageError` where that fails."""
        return self.reduced(index)

    def reduced(self, index: int, reduce: Reduce | None = None) -> Sample:
        """Image `index`, decoded smaller where `reduce` allows it (see `read_image`)."""
        return read_image(self.path(index), pixels=self.pixels, reduce=reduce)

    def values(self, index: int) -> np.ndarray:
        """The values of image `index` as they are stored, [C, H, W]."""
        return read_values(self.path(index), pixels=self.pixels)

    def path(self, index: int) -> str:
        """The image's file."""
        return str(self.root / self._names[index])
