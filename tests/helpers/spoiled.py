"""Folders of images some of which cannot be used, in every way that there is."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dino.data.sources.open import Folder

SIDE = 24
BOMB = 10**6
"""Pixels a side that the header of a decompression bomb claims."""


def _jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "JPEG")
    return stream.getvalue()


def bomb(width: int = BOMB, height: int = BOMB) -> bytes:
    """A PNG whose header claims a huge size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", b"x\x9c"), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _five_channels() -> bytes:
    np.save(stream := io.BytesIO(), np.zeros((SIDE, SIDE, 5), np.uint8))
    return stream.getvalue()


def _vanish(path: Path) -> None:
    path.unlink()


def _become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What spoils a file: its bytes, before the folder is scanned; and what happens to it afterwards.
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "damaged": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "not an image": lambda whole: b"<html>not found</html>",
    "too large": lambda whole: bomb(),
    "misfit": lambda whole: _five_channels(),
}
LATER: dict[str, Callable[[Path], None]] = {"missing": _vanish, "unreadable": _become_a_folder}
KINDS = (*BYTES, *LATER)


def spoil(root: Path, files: int, each: int) -> tuple[Folder, dict[str, str]]:
    """A folder of small JPEGs, `each` of every kind of bad file among them, evenly spread.

    Returns:
        The folder, scanned before the last of them went bad; and the defect of each bad file.
    """
    root.mkdir(parents=True)
    places = np.linspace(0, files - 1, each * len(KINDS)).round().astype(int)
    kinds = dict(zip(places.tolist(), KINDS * each, strict=True))
    whole = [_jpeg(number) for number in range(16)]
    wrong = {}
    for number in range(files):
        path, content = root / f"{number:06}.jpg", whole[number % len(whole)]
        kind = kinds.get(number, "")
        path.write_bytes(BYTES[kind](content) if kind in BYTES else content)
        if kind:
            wrong[str(path)] = kind
    source = Folder(root)
    for path, kind in wrong.items():
        if kind in LATER:
            LATER[kind](Path(path))
    return source, wrong
