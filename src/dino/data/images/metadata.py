"""PNGs and JPEGs without the parts that hold no pixels, for those whose metadata are damaged."""

from __future__ import annotations

import struct
from io import BytesIO

from dino.data.images.pixel_format import Stream

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


def pixels_only(stream: Stream) -> BytesIO | None:
    """The file with nothing but its pixels and colours; None for other formats."""
    stream.seek(0)
    content = stream.read()
    if content.startswith(_PNG):
        return BytesIO(_png(content))
    return BytesIO(_jpeg(content)) if content.startswith(_JPEG) else None


def _png(content: bytes) -> bytes:
    """The critical chunks, whose names begin with a capital, and the transparency."""
    parts, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunk = content[place : place + 12 + length]
        if chunk[4:5].isupper() or chunk[4:8] == b"tRNS":
            parts.append(chunk)
        place += len(chunk)
    return b"".join(parts)


def _jpeg(content: bytes) -> bytes:
    """All segments but comments and APP1 to APP15; but Adobe's, which names the colours."""
    parts, place = [_JPEG], 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        marker, (length,) = content[place + 1], struct.unpack_from(">H", content, place + 2)
        adobe = marker == 0xEE and length >= 14
        if adobe or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            parts.append(content[place : place + 2 + length])
        place += 2 + length
    return b"".join([*parts, content[place:]])
