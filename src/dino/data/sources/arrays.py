"""Numpy arrays of images, in memory or in a `.npy` file that stays on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.images.decode import OpenedImage
from dino.data.images.pixel_format import planes
from dino.data.sources.base import Source, sampled
from dino.files import UserError


class Arrays(Source):
    """The images of an array [N, H, W], [N, H, W, C] or [N, C, H, W].

    Of four axes the smaller one of the second and the last counts the channels. Values are taken by
    `dino.data.images.decode.open_image`, which says what they may be.

    Args:
        data: an array, or the path of a `.npy` file, which is mapped into memory: only the images
            that are read are loaded, and processes share them.

    Raises:
        UserError: if the file is missing or no array, or the array is empty or of another shape.
    """

    def __init__(self, data: np.ndarray | Path) -> None:
        self._data = data
        self.name = "the array" if isinstance(data, np.ndarray) else str(data)
        shape = self._images.shape
        if len(shape) not in (3, 4) or 0 in shape:
            raise UserError(
                f"{self.name} has shape {shape}: images need [N,H,W], [N,H,W,C] or [N,C,H,W], not 0"
            )

    @cached_property
    def _images(self) -> np.ndarray:
        if isinstance(self._data, np.ndarray):
            return self._data
        if not os.path.isfile(self._data):  # noqa: PTH113, Path's may raise
            raise UserError(f"{self.name} does not exist: give --data an array of images")
        try:
            # Not by np.load, which would read the directory of a zip archive under this name.
            return np.lib.format.open_memmap(self._data, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name} cannot be read as a .npy array: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapping: another process maps the file anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> np.ndarray:
        """The values of image `index`, [H, W] or [H, W, C]."""
        native = self._images.dtype.newbyteorder("=")
        image = np.array(self._images[index], dtype=native)  # copied: a mapping is read-only
        if image.ndim == 3 and image.shape[0] < image.shape[2]:
            image = image.transpose(1, 2, 0)
        return image

    @contextmanager
    def open(self, index: int) -> Iterator[OpenedImage]:
        """Image `index`; numbers of any type in a file, as in a `.npy` file of a folder."""
        if isinstance(self._data, Path) and self._images.dtype.kind in "buif":
            yield OpenedImage(planes(self.content(index)), self.path(index), self.pixels)
        else:
            with super().open(index) as image:
                yield image

    def path(self, index: int) -> str:
        """The image's index in the array."""
        return f"image {index} of {self.name}"

    def identity(self) -> list[bytes]:
        """The shape, and some values of the first, middle and last image."""
        places = sorted({0, len(self) // 2, len(self) - 1})
        samples = [sampled(self._images[index]) for index in places]
        return [str(self._images.shape).encode(), *samples]
