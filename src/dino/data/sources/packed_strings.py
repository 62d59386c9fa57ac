"""Many strings in little memory, shared by all worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class PackedStrings(Sequence[str]):
    """An immutable list of strings in two arrays.

    A Python list of a million strings is copied into every worker page by page, since reading a
    string writes its reference count; these arrays stay shared, and are pickled in milliseconds.

    Attributes:
        text: the bytes of all strings.
        ends: where each string ends in `text`.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        strings = list(strings)
        joined = "".join(strings)
        encoded = strings if joined.isascii() else [os.fsencode(string) for string in strings]
        self.ends = np.cumsum(list(map(len, encoded)), dtype=np.int64)
        self.text = np.frombuffer(os.fsencode(joined), dtype=np.uint8)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> PackedStrings:
        """The strings of two such arrays, without a copy."""
        strings = cls(())
        strings.text, strings.ends = text, ends
        return strings

    @classmethod
    def joined(cls, lists: Sequence[PackedStrings]) -> PackedStrings:
        """The strings of all lists (at least one), in one list."""
        shifts = np.cumsum([0, *(len(one.text) for one in lists[:-1])])
        ends = [one.ends + shift for one, shift in zip(lists, shifts, strict=True)]
        return cls.of(np.concatenate([one.text for one in lists]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:  # slices are not supported
        position = range(len(self))[index]  # negative indices, and IndexError beyond the end
        start = int(self.ends[position - 1]) if position else 0
        return os.fsdecode(self.text[start : int(self.ends[position])].tobytes())
