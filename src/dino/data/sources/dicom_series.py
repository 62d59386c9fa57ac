"""The order of the slices of a DICOM series: by their position, not by the names of their files.

The few tags that it takes are found in the first bytes of a file without reading its other tags,
since a folder may hold a million files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

from dino.data.images.pixel_format import is_dicom
from dino.progress import bar

START = 2**14
"""Bytes that are read of each file."""

THREADS, CHUNK = 16, 64


class _Slice(NamedTuple):
    """Where an image lies in its series."""

    series: bytes
    position: float
    number: float


def ordered(root: Path, names: Sequence[str], candidates: Sequence[int]) -> list[str]:
    """The names with each series of a folder in the order of its positions.

    A series takes the places that its files had: all other files stay where they were. Positions
    are along the normal of the slices (C.7.6.2.1.1); where some have none, instance numbers count.

    Args:
        root: folder that the names start from.
        names: of all files.
        candidates: places, in `names`, of those that may be DICOM.
    """
    found: dict[tuple[str, bytes], list[tuple[_Slice, int]]] = defaultdict(list)
    paths = (root / names[place] for place in candidates)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        bar("DICOM series", len(candidates), shown=len(candidates) > 1000) as advance,
    ):
        for place, one in zip(candidates, pool.map(_read, paths, chunksize=CHUNK), strict=True):
            advance(1)
            if one is not None:
                found[names[place].rpartition("/")[0], one.series].append((one, place))
    result = list(names)
    for slices in found.values():
        by_position = all(one.position < inf for one, _ in slices)
        key = [(one.position if by_position else one.number, place) for one, place in slices]
        for (_, place), (_, source) in zip(slices, sorted(key), strict=True):
            result[place] = names[source]
    return result


def _read(path: Path) -> _Slice | None:
    """The place of a file in its series; None if it has none."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(START)
        if is_dicom(start[:132]) and (series := _text(start, b"\x0e\0", b"UI")):
            position, axes = (_numbers(start, tag) for tag in (b"\x32\0", b"\x37\0"))
            number = _numbers(start, b"\x13\0", b"IS")
            along = _along_normal(position, axes) if (len(position), len(axes)) == (3, 6) else inf
            return _Slice(series, along, number[0] if number else inf)
    return None


def _along_normal(position: Sequence[float], axes: Sequence[float]) -> float:
    """The length of a position along the normal of a slice with the axes (row, column)."""
    a, b, c, d, e, f = axes
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return sum(p * n for p, n in zip(position, normal, strict=True))


def _numbers(start: bytes, tag: bytes, kind: bytes = b"DS") -> list[float]:
    with suppress(ValueError):
        return [float(part) for part in _text(start, tag, kind).split(b"\\")]
    return []


def _text(start: bytes, element: bytes, kind: bytes) -> bytes:
    """The value of an element of group 20 (hexadecimal), in little-endian files; b"" for none."""
    explicit = re.search(rb"\x20\x00" + re.escape(element) + kind + rb"(..)", start, re.DOTALL)
    implicit = explicit or re.search(
        rb"\x20\x00" + re.escape(element) + rb"(..)\x00\x00", start, re.DOTALL
    )
    if implicit is None:
        return b""
    length = int.from_bytes(implicit[1], "little")
    return start[implicit.end() : implicit.end() + length].strip(b" \0")
