"""A user's data set or sequence as a source of images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from dino.data.images.decode import image_entry
from dino.data.sources.base import Source, sampled, shared_folder
from dino.data.sources.folder import KINDS
from dino.files import UserError


class TorchDataset(Source):
    """A user's data set or sequence; `open_source` lists the types of items.

    Labels are taken from its `targets` (as in torchvision), also through a
    `torch.utils.data.Subset`, or from the items of a list or tuple of (image, label) pairs. Names
    are taken from its method `path`, or from the paths in `samples` (as in torchvision's folders).

    Args:
        data: has a length, and items by index.
        labels: of its items, where it has no `targets`.

    Raises:
        UserError: if it has no length or no items by index, or is empty.
    """

    def __init__(self, data: Any, labels: Any = None) -> None:
        self._data, self._kind = data, type(data).__name__
        keys = data.keys() if hasattr(data, "keys") else getattr(data, "column_names", None)
        if keys is not None:  # a dict, a DatasetDict, a table of columns
            names = ", ".join(map(repr, list(keys)[:4])) or "nothing"
            raise UserError(
                f"cannot take images from a {self._kind} of {names}: give the images in it, with "
                f"len() and items by number, as in data{image_entry(keys)}"
            )
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        if not indexed or isinstance(data, (IterableDataset, bytes, bytearray)):
            sources = f"give {KINDS}, or a data set with len() and indexing"
            raise UserError(f"cannot take images from a {self._kind}: {sources}")
        try:
            self._length = len(data)
        except (TypeError, NotImplementedError) as error:
            raise UserError(f"the {self._kind} given as data has no length: {error}") from error
        if self._length == 0:
            raise UserError(f"the {self._kind} given as data is empty")
        self.labels = _labels(data) if labels is None else _class_numbers(labels, self._length)
        if self.labels is not None:
            classes = getattr(_innermost(data, 0)[0], "classes", None)
            if not isinstance(classes, (list, tuple)) or len(classes) <= max(self.labels):
                classes = range(max(self.labels) + 1)
            self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return self._length

    def content(self, index: int) -> Any:
        """The item."""
        return self._data[index]

    def path(self, index: int) -> str:
        """The item's file, if the data set names it; else its index."""
        return self._file(index) or f"item {index} of the {self._kind}"

    def _file(self, index: int) -> str | None:
        data, inner = _innermost(self._data, index)
        if callable(path := getattr(data, "path", None)):
            return str(path(inner))
        samples = getattr(data, "samples", None)
        sample = samples[inner] if isinstance(samples, list) else None
        file = _first(sample) if isinstance(sample, (list, tuple)) else None
        return os.fspath(file) if isinstance(file, (str, os.PathLike)) else None

    def identity(self) -> list[bytes]:
        """Its files relative to their common folder, or sampled values of a list or tensor.

        Items of other data sets are not read, since they may be drawn at random, or read from files
        that must be opened in each worker: there only number and labels are covered.
        """
        files = [self._file(index) for index in range(self._length)]
        names = [name for name in files if name is not None]
        if len(names) == self._length:
            shared = len(shared_folder(names))
            return [name[shared:].encode("utf-8", "surrogatepass") for name in names]
        if isinstance(self._data, (list, tuple, Tensor, TensorDataset)):
            places = sorted({0, self._length // 2, self._length - 1})
            return [_sampled_item(self._data[index]) for index in places]
        return []


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, (list, tuple)) and item else item


def _sampled_item(item: Any) -> bytes:
    image = _first(item)
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    numbers = isinstance(image, np.ndarray) and image.dtype.kind in "buif"
    return sampled(np.asarray(image)) if numbers or isinstance(image, Image.Image) else b""


def _innermost(data: Any, index: int) -> tuple[Any, int]:
    """The data set that subsets were taken of, and the index of an item in it."""
    while isinstance(data, Subset):
        data, index = data.dataset, data.indices[index]
    return data, index


def _labels(data: Any) -> list[int] | None:
    if isinstance(data, Subset):
        inner = _labels(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    if not isinstance(data, (list, tuple)):
        return _class_numbers(getattr(data, "targets", None), len(data))
    pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in data)
    return _class_numbers([item[1] for item in data], len(data)) if pairs else None


def _class_numbers(labels: Any, count: int) -> list[int] | None:
    """Labels as integers from 0, one for each of `count` items; None where they are not."""
    if labels is None or len(labels) != count:
        return None
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    valid = all(isinstance(label, (int, np.integer)) and label >= 0 for label in labels)
    return [int(label) for label in labels] if valid else None
