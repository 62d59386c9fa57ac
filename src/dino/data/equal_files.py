"""Groups of files with the same bytes."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from dino.progress import bar

THREADS, CHUNK = 16, 256
"""Threads, which mostly wait for a disk or server, and files that each takes at a time."""
TAIL = 2**12
"""Bytes at the end of a file that are compared before all are read."""

Group = list[int]


def equal_files(
    paths: Sequence[str], wanted: Callable[[Group], bool] = lambda group: len(group) > 1
) -> list[Group]:
    """Groups of files with the same bytes, each in the order of `paths`.

    Compared are sizes, then the last 4,096 bytes of files of one size, then all bytes of those
    that agree. What is no file is in no group.

    Args:
        paths: of the files.
        wanted: which groups of files that may be equal are of interest.
    """
    groups: list[Group] = [list(range(len(paths)))]
    for key in (_size, _tail, _digest):
        groups = _split(filter(wanted, groups), paths, key)
    return [group for group in groups if wanted(group)]


def _split(
    groups: Iterable[Group], paths: Sequence[str], key: Callable[[str], Hashable | None]
) -> list[Group]:
    """The parts of each group whose files have the same key; files without one are left out."""
    rows = [(number, row) for number, group in enumerate(groups) for row in group]
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    parts: dict[Hashable, Group] = defaultdict(list)
    with ThreadPoolExecutor(THREADS) as pool, bar("comparing files", len(rows)) as advance:
        keys = pool.map(lambda chunk: [key(paths[row]) for _, row in chunk], chunks)
        for chunk, values in zip(chunks, keys, strict=True):
            for (number, row), value in zip(chunk, values, strict=True):
                if value is not None:
                    parts[number, value].append(row)
            advance(len(chunk))
    return list(parts.values())


def _size(path: str) -> int | None:
    with suppress(OSError, ValueError):
        status = os.stat(path)  # noqa: PTH116 - a million times
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def _tail(path: str) -> bytes | None:
    with suppress(OSError), open(path, "rb") as file:  # noqa: PTH123
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read()
    return None


def _digest(path: str) -> bytes | None:
    with suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).digest()
    return None
