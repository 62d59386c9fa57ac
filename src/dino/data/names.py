"""Many strings in little memory, shared by all worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


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
