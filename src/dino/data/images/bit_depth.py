"""Bits of the values in image files, and the files that Pillow would cut to 8 bits.

Pillow has no mode for colour of more than 8 bits a channel: it opens 16-bit PNGs, JPEG 2000 and
others in a mode of 8 bits. Where the values matter, imagecodecs reads them.

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageMode

from dino.data.images.image_errors import ImageError, missing_extra
from dino.data.images.pixel_format import (
    NO_INFO,
    PixelFormat,
    Stream,
    ValueInfo,
    by_rows,
    check_size,
    planes,
)

_CODECS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
_LUMA = (0.299, 0.587, 0.114)  # as Pillow's "L" (ITU-R 601-2)
_FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # EXIF orientation -> axes

SWAPPED = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


class Stored(NamedTuple):
    """What an image is stored as.

    Attributes:
        channels: of a palette, those of its colours.
        bits: of each value.
        floating: whether values are floating-point numbers.
    """

    channels: int
    bits: int
    floating: bool

    @property
    def bytes(self) -> int:
        """Of each value in memory."""
        return -(-self.bits // 8)

    def __str__(self) -> str:
        """Such as "3 channels of 8 bits"."""
        plural = "s" * (self.channels != 1)
        bits = f"{self.bits} bit{'s' * (self.bits != 1)}"
        return f"{self.channels} channel{plural} of {bits}{' (floats)' * self.floating}"


def of_values(values: Shaped[np.ndarray, "C H W"], info: ValueInfo = NO_INFO) -> Stored:
    """What an array is stored as; the bits of a file count, if it states them."""
    floating = values.dtype.kind == "f" and info.bits is None
    return Stored(info.channels or len(values), info.bits or _bits(values.dtype), floating)


def of_picture(picture: Image.Image, stream: Stream | None) -> Stored:
    """What a picture is stored as in its file; it is not decoded. Without a file, its mode."""
    kind = np.dtype(ImageMode.getmode(picture.mode).typestr)
    channels = len(picture.getbands())
    if picture.mode in ("P", "PA"):
        channels = 4 if picture.has_transparency_data else 3
    elif picture.format == "PNG" and _arguments(picture)[:1] == ["LA;16B"]:
        channels = 2  # of which Pillow makes four
    bits = 0 if stream is None else _file_bits(picture, stream)
    return Stored(channels, bits or _bits(kind), kind.kind == "f")


def narrowed(picture: Image.Image, stored: Stored, stream: Stream) -> bool:
    """Whether Pillow would cut the values of a file to its mode, or shift those with a sign."""
    if picture.format == "JPEG2000" and _jpeg2000_precision(stream) & 0x80:
        return True
    return stored.bits > max(8, _bits(np.dtype(ImageMode.getmode(picture.mode).typestr)))


def spare_bits(picture: Image.Image, stored: Stored) -> int:
    """By how many bits Pillow shifts the grey values of a file up, to fill 16."""
    shifted = picture.format == "JPEG2000" and picture.mode.startswith("I;16")
    return 16 - stored.bits if shifted else 0


def read_all_bits(
    picture: Image.Image,
    stream: Stream,
    name: str,
    pixels: PixelFormat,
    bits: int,
    orientation: int,
) -> Shaped[np.ndarray, "C H W"]:
    """The values of a file that Pillow would cut, turned upright from EXIF's orientation 1 to 8.

    With 3 channels or 1, what is transparent becomes white; with 1, colour becomes grey.

    Raises:
        ImageError: for a format that has no other decoder, or if it is not installed.
    """
    stream.seek(0)
    values = upright(_decoded(picture, stream, name, bits), orientation)
    transparent = len(values) in (2, 4) and picture.has_transparency_data
    return expected_colours(values, pixels, bits, transparent)


def expected_colours(
    values: Shaped[np.ndarray, "stored H W"], pixels: PixelFormat, bits: int, transparent: bool
) -> Shaped[np.ndarray, "C H W"]:
    """With 3 channels or 1, what is transparent by the last one becomes white; colour grey."""
    if pixels.channels not in (1, 3):
        return values
    if transparent:
        values = by_rows(partial(_on_white, top=2**bits - 1), values)
    return by_rows(grey, values) if pixels.channels == 1 else values


def _on_white(values: np.ndarray, top: int) -> np.ndarray:
    alpha = values[-1:] / top
    return np.rint(values[:-1] * alpha + top * (1 - alpha)).astype(values.dtype)


def upright(values: Shaped[np.ndarray, "C H W"], orientation: int) -> Shaped[np.ndarray, "C h w"]:
    """An image turned upright from an orientation 1 to 8 of EXIF or TIFF."""
    if orientation in SWAPPED:
        values = values.swapaxes(1, 2)
    return np.flip(values, _FLIPS.get(orientation, ()))


def grey(values: Shaped[np.ndarray, "stored H W"]) -> Shaped[np.ndarray, "C H W"]:
    """Three channels as one of grey; others as they are."""
    if len(values) != 3:
        return values
    found = np.tensordot(_LUMA, values, 1)[None]
    return (found if values.dtype.kind == "f" else np.rint(found)).astype(values.dtype)


def _decoded(picture: Image.Image, stream: Stream, name: str, bits: int) -> np.ndarray:
    reason = f"its values have {bits} bits, of which Pillow reads 8"
    decoder = _CODECS.get(picture.format or "")
    if decoder is None:
        raise ImageError(name, f"{reason}: convert it to TIFF or PNG", "misfit")
    try:
        import imagecodecs
    except ImportError:
        raise missing_extra(name, reason, "tiff") from None
    check_size(name, 4 * picture.width * picture.height, -(-bits // 8))
    return planes(getattr(imagecodecs, decoder)(stream.read()))


# ---------------------------------------------------------------------------------- bits of files
def _bits(kind: np.dtype) -> int:
    return 1 if kind == np.bool_ else 8 * kind.itemsize


def _file_bits(picture: Image.Image, stream: Stream) -> int:
    """Bits of the values in a file by its header; 0 where Pillow's mode has them."""
    arguments = _arguments(picture)
    if picture.format == "TIFF":
        bits: Any = picture.tag_v2.get(258, 1)  # type: ignore[attr-defined]
        return int(np.max(bits))
    if picture.format == "PPM" and len(arguments) > 1:  # the mode and the largest value
        return int(arguments[1]).bit_length()
    if picture.format == "JPEG2000":
        return (_jpeg2000_precision(stream) & 0x7F) + 1
    if picture.format == "AVIF":  # flags of the codec's configuration
        flags = _behind(stream, b"av1C", 6)
        return 12 if flags & 0x20 else 10 if flags & 0x40 else 8
    deep = arguments and re.search(r";16[BLN]$", str(arguments[0]))
    return 16 if deep or _tile(picture)[0] == "SGI16" else 0


def _jpeg2000_precision(stream: Stream) -> int:
    """Ssiz of the first component, behind SOC and SIZ: its bits - 1, and 128 if it has a sign."""
    return _behind(stream, b"\xff\x4f\xff\x51", 42)


def _tile(picture: Image.Image) -> Sequence[Any]:
    """Codec, box, offset and arguments of the first part that Pillow decodes."""
    return (getattr(picture, "tile", None) or [("", None, 0, ())])[0]


def _arguments(picture: Image.Image) -> list[Any]:
    """Arguments of Pillow's decoder; first the mode of the values in the file."""
    arguments = _tile(picture)[3]
    return list(arguments) if isinstance(arguments, tuple) else [arguments]


def ends(stream: Stream) -> bool:
    """Whether a JPEG 2000 file holds its end mark, two bytes that its code stream cannot hold."""
    stream.seek(0)
    return b"\xff\xd9" in stream.read()


def _behind(stream: Stream, mark: bytes, offset: int) -> int:
    """The byte at `offset` from a mark in a file; 0 where there is none."""
    position = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(position)
    start = content.find(mark)
    return content[start + offset] if 0 <= start < len(content) - offset else 0
