"""Numpy arrays of images, in memory or in a `.npy` file that stays on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.sources.base import Source, sampled
from dino.files import UserError


class Arrays(Source):
    """The images of an array [N, H, W], [N, H, W, C] or [N, C, H, W].

    Of four axes the smaller one of the second and the last counts the channels. Values are taken by
    `dino.data.images.decode.open_image`, which says what they may be.

    Args:
        data: an array, or the path of a `.npy` file, which is mapped into memory: only what is
            read is loaded, and processes share it.

    Raises:
        UserError: if the file is missing or no array, or the array is empty or of another shape.
    """

    def __init__(self, data: np.ndarray | Path) -> None:
        self._data = data
        self.name = "the array" if isinstance(data, np.ndarray) else str(data)
        self._images = self._opened()
        shape = self._images.shape
        if len(shape) not in (3, 4):
            raise UserError(
                f"{self.name} has shape {shape}: images need [N,H,W], [N,H,W,C] or [N,C,H,W]"
            )
        if 0 in shape:
            raise UserError(f"{self.name} is empty: its shape is {shape}")

    def _opened(self) -> np.ndarray:
        if isinstance(self._data, np.ndarray):
            return self._data
        if not os.path.isfile(self._data):  # noqa: PTH113, Path's may raise
            raise UserError(f"{self.name} does not exist: give --data an array of images")
        try:
            images: Any = np.load(self._data, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.name} cannot be read as a .npy array: {error}") from None
        if not isinstance(images, np.ndarray):  # a .npz under another name
            images.close()
            raise UserError(f"{self.name} holds several arrays: save the images alone with np.save")
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: another process maps the file anew."""
        hidden = {} if isinstance(self._data, np.ndarray) else {"_images": None}
        return {**self.__dict__, **hidden}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._mapped())

    def _mapped(self) -> np.ndarray:
        if self._images is None:  # in a new process, or in a copy
            self._images = self._opened()
        return self._images

    def content(self, index: int) -> np.ndarray:
        """The values of image `index`, [H, W] or [H, W, C]."""
        image = np.array(self._mapped()[index])  # copied, since what is mapped is read-only
        if image.ndim == 3 and image.shape[0] < image.shape[2]:
            image = image.transpose(1, 2, 0)
        return image

    def path(self, index: int) -> str:
        """The image's place."""
        return f"image {index} of {self.name}"

    def identity(self) -> list[bytes]:
        """The shape, and some values of the first, middle and last image."""
        images = self._mapped()
        some = sorted({0, len(images) // 2, len(images) - 1})
        return [str(images.shape).encode(), *(sampled(images[index]) for index in some)]
