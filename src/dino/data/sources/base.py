"""What all sources of images have in common: reading them, whatever they come as."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dino.data.images.decode import Reduce, Sample, as_image, as_values, read_image, read_values
from dino.data.images.pixel_format import RGB, PixelFormat


class Images:
    """Images by index; a kind of source says what they come as and what they are called.

    Attributes:
        pixels: channels and range expected of them (`dino.data.sources.open.open_source` sets it).
        labels: class index of each image, or None where there are no classes.
        classes: name of each class, or None.
    """

    pixels: PixelFormat = RGB
    labels: list[int] | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def content(self, index: int) -> Any:
        """A path or an open binary file, or what `decode.as_image` takes."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """What to call image `index` in a message."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` if it cannot be used."""
        return self.reduced(index)

    def reduced(self, index: int, reduce: Reduce | None = None) -> Sample:
        """Image `index`, decoded smaller where `reduce` allows it (see `read_image`)."""
        return self.decoded(self.content(index), index, reduce)

    def decoded(self, content: Any, index: int, reduce: Reduce | None = None) -> Sample:
        """Image `index`, whose content is at hand."""
        if is_file(content):
            return read_image(content, self.path(index), self.pixels, reduce)
        return as_image(content, self.path(index), self.pixels)

    def values(self, index: int) -> Shaped[np.ndarray, "C H W"]:
        """The values of image `index` as they are stored; raises `ImageError` as well."""
        content = self.content(index)
        if is_file(content):
            return read_values(content, self.path(index), self.pixels)
        return as_values(content, self.path(index), self.pixels)


def is_file(content: Any) -> bool:
    """Whether an image's content is a path or an open file, and not its pixels."""
    return isinstance(content, (str, os.PathLike)) or hasattr(content, "read")
