"""What all sources of images have in common: reading them, whatever they come as."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from dino.data.images.decode import OpenedImage, Sample, open_image
from dino.data.images.pixel_format import RGB, PixelFormat


class Images:
    """Images by index; a kind of source says what they come as and what they are called.

    Attributes:
        pixels: channels and range expected of them (`dino.data.sources.open.open_source` sets it).
        labels: class index of each image, or None where there are no classes.
        classes: name of each class, or None.
        left_out: number of files that are not read, by their ending in lower case.
    """

    pixels: PixelFormat = RGB
    labels: list[int] | None = None
    classes: list[str] | None = None
    left_out: Mapping[str, int] = MappingProxyType({})

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def content(self, index: int) -> Any:
        """A path, an open binary file or a sample, as `open_image` takes them."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """What to call image `index` in a message."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` if it cannot be used."""
        with self.open(index) as image:
            return image.decode()

    def open(self, index: int) -> AbstractContextManager[OpenedImage]:
        """Image `index`, its size known, its pixels not decoded yet; see `open_image`."""
        return open_image(self.content(index), self.path(index), self.pixels)
