"""Any data set or sequence of a user's as a source of images."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from dino.data.sources.base import Images
from dino.files import UserError


class Samples(Images):
    """A user's data set or sequence; `open_source` lists the types of items.

    Labels are taken from its `targets` (as torchvision's data sets have them), through a
    `torch.utils.data.Subset`, or from the items of a list or tuple of (image, label) pairs.

    Args:
        data: has a length, and items by index.
        labels: of its items, where they are known from elsewhere.

    Raises:
        UserError: if it is empty.
    """

    def __init__(self, data: Any, labels: Any = None) -> None:
        if len(data) == 0:
            raise UserError(f"the {type(data).__name__} given as data is empty")
        self._data = data
        self.labels = _labels(data) if labels is None else _class_numbers(labels, len(data))
        self.classes = None
        if self.labels is not None:
            names = getattr(_innermost(data), "classes", None)
            self.classes = (
                [str(name) for name in names]
                if isinstance(names, (list, tuple)) and len(names) > max(self.labels)
                else [str(label) for label in range(max(self.labels) + 1)]
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._data)

    def content(self, index: int) -> Any:
        """The item."""
        return self._data[index]

    def path(self, index: int) -> str:
        """The item's place, since a data set knows no paths."""
        return f"item {index} of the {type(self._data).__name__}"


def _innermost(data: Any) -> Any:
    while isinstance(data, Subset):
        data = data.dataset
    return data


def _labels(data: Any) -> list[int] | None:
    if isinstance(data, Subset):
        inner = _labels(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    labels = getattr(data, "targets", None)
    if isinstance(data, (list, tuple)):
        pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in data)
        labels = [item[1] for item in data] if pairs else None
    return _class_numbers(labels, len(data))


def _class_numbers(labels: Any, count: int) -> list[int] | None:
    """Labels as whole numbers from 0, one for each of `count` items; None where they are not."""
    if labels is None or len(labels) != count:
        return None
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if not all(isinstance(label, (int, np.integer)) and label >= 0 for label in labels):
        return None
    return [int(label) for label in labels]
