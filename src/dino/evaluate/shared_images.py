"""Images that occur more than once among files, found by their bytes."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dino.data.sources.open import Source
from dino.progress import bar

THREADS, CHUNK = 16, 256
"""Threads, which mostly wait for a disk or server, and files that each takes at a time."""
TAIL = 2**12
"""Bytes at the end of a file that are compared before all are read."""
EXAMPLES = 10
"""Most shared images that a result names."""

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


@dataclass(frozen=True)
class SharedImages:
    """Test images that also serve as training images, or as the bank of k-NN.

    Attributes:
        count: how many of the test images.
        images: how many there are.
        examples: up to ten, each with its equal.
        leave_one_out: whether the test images are the bank itself, so that equals are others in it.
    """

    count: int
    images: int
    examples: list[tuple[str, str]]
    leave_one_out: bool

    def sentence(self) -> str:
        """What a table says of them; "" if there are none."""
        if not self.count:
            return ""
        where = "have a copy in the bank" if self.leave_one_out else "are also training images"
        first, equal = self.examples[0]
        return (
            f"{self.count:,} of {self.images:,} test images {where} (files with equal bytes), "
            f"such as {first} and {equal}: they are counted, but test nothing"
        )


def paths_of(*sources: Source) -> list[str]:
    """The names of all images of some sources; those of files are their paths."""
    return [source.path(index) for source in sources for index in range(len(source))]


def shared_images(training: Sequence[str], test: Sequence[str] | None) -> SharedImages | None:
    """Compare test images with training images, or the images of a bank with each other.

    Args:
        training: the paths of the training images, or of the bank.
        test: those of the test images; None where each image of the bank is one.

    Returns:
        None where the images of a side are no files, which are not compared.
    """
    sides = [training] if test is None else [training, test]
    if not all(any(map(os.path.isfile, paths)) for paths in sides):
        return None
    start = 0 if test is None else len(training)  # of the test images among all paths
    paths = [*training, *(test or ())]

    def wanted(group: Group) -> bool:
        return len(group) > 1 and (test is None or group[0] < start <= group[-1])

    pairs = [
        (paths[image], paths[group[0] if image != group[0] else group[1]])
        for group in equal_files(paths, wanted)
        for image in group
        if image >= start
    ]
    return SharedImages(len(pairs), len(paths) - start, pairs[:EXAMPLES], test is None)
