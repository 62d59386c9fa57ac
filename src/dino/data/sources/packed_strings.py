"""Image files by name: many paths in little memory, shared by all worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.sources.base import Images


class Names(Sequence[str]):
    """An immutable list of strings in two arrays.

    A Python list of a million strings is copied into every worker page by page, since reading a
    string writes its reference count; these arrays stay shared, and pickle in an instant.

    Attributes:
        text: the bytes of all strings.
        ends: where each string ends in `text`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        joined = "".join(names)
        encoded = names if joined.isascii() else [os.fsencode(name) for name in names]
        self.ends = np.cumsum(list(map(len, encoded)), dtype=np.int64)
        self.text = np.frombuffer(os.fsencode(joined), dtype=np.uint8)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> Names:
        """The strings of two such arrays, without a copy."""
        names = cls(())
        names.text, names.ends = text, ends
        return names

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """The strings of all parts, in one list."""
        if not parts:
            return cls(())
        shifts = np.cumsum([0, *(len(part.text) for part in parts[:-1])])
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=True)]
        return cls.of(np.concatenate([part.text for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """String `index`, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # negative indices, and IndexError beyond the end
        start = int(self.ends[position - 1]) if position else 0
        return os.fsdecode(self.text[start : int(self.ends[position])].tobytes())


class Files(Images):
    """Images that lie in files.

    Args:
        root: folder that relative names start from.
        names: of the files, in the order of the source.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root, self._folder = root, os.fspath(root)
        self._names = Names(names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def content(self, index: int) -> str:
        """The image's file."""
        return self.path(index)

    def path(self, index: int) -> str:
        """The image's file."""
        # Not by pathlib: it interns each part, which writes to pages that workers share.
        return os.path.join(self._folder, self._names[index])  # noqa: PTH118


def numbered(labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """The classes among some labels, in order, and the number of each label's class.

    Classes that are all whole numbers are ordered by size, others by name.
    """
    names = set(labels)
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    classes = sorted(names, key=(lambda name: (int(name), name)) if whole else None)
    number = {name: index for index, name in enumerate(classes)}
    return classes, [number[label] for label in labels]
