"""Images in FITS, as astronomers write them (FITS standard 4.0).

Pillow reads 16-bit values without their sign and ignores BZERO and BSCALE.

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import Stream, ValueInfo, check_size

_BLOCK, _CARD = 2880, 80
_TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}  # by BITPIX
_UNSIGNED = {"i2": 2**15, "i4": 2**31}  # BZERO by which unsigned integers are stored as signed


def read_fits(file: Stream, name: str) -> tuple[Shaped[np.ndarray, "C H W"], ValueInfo]:
    """The first image of a FITS file, its first row at the bottom; planes of a cube are channels.

    Raises:
        ImageError: if it holds tables only, compressed images or more than three axes.
        ValueError: if the file is damaged.
    """
    while True:
        header = _header(file)
        sides = [int(header[f"NAXIS{n}"]) for n in range(int(header.get("NAXIS", 0)), 0, -1)]
        kind = np.dtype(_TYPES[int(header["BITPIX"])])
        extra = int(header.get("PCOUNT", 0)) if "XTENSION" in header else 0
        if len(sides) >= 2 and header.get("XTENSION", "IMAGE") == "IMAGE" and all(sides):
            break
        if "ZIMAGE" in header:
            raise ImageError(name, "it is a compressed FITS: unpack it with funpack", "misfit")
        size = (math.prod(sides) if sides else 0) * kind.itemsize + extra
        file.seek(-(-size // _BLOCK) * _BLOCK, 1)
    planes, height, width = math.prod(sides[:-2]), *sides[-2:]
    if len([side for side in sides if side > 1]) > 3:
        raise ImageError(name, f"a FITS image of shape {tuple(sides)} is no image", "misfit")
    check_size(name, planes * height * width, kind.itemsize)
    count = planes * height * width
    values = np.frombuffer(file.read(count * kind.itemsize), kind, count)
    values = values.reshape(planes, height, width)[:, ::-1].astype(kind.newbyteorder("="))
    return _in_units(values, header)


def _header(file: Stream) -> dict[str, str]:
    """The cards of a header by their keyword, without quotes and comments."""
    cards: dict[str, str] = {}
    while "END" not in cards:
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ValueError("it ends before an image" if not block else "its header is cut off")
        for start in range(0, _BLOCK, _CARD):
            card = block[start : start + _CARD].decode("latin-1")
            keyword, value = card[:8].strip(), card[10:].strip()
            quoted = value.startswith("'")
            cards.setdefault(keyword, value.split("'")[1] if quoted else value.partition("/")[0])
            cards[keyword] = cards[keyword].strip()
            if keyword == "END":
                break
    return cards


def _in_units(
    values: np.ndarray, header: dict[str, str]
) -> tuple[Shaped[np.ndarray, "C H W"], ValueInfo]:
    """BZERO + BSCALE x the stored values; pixels that have the value BLANK hold none."""
    zero, scale = (
        float(header.get(key, default)) for key, default in (("BZERO", 0), ("BSCALE", 1))
    )
    blank = float(header["BLANK"]) if values.dtype.kind in "ui" and "BLANK" in header else None
    nodata = None if blank is None else zero + scale * blank
    if (zero, scale) == (0, 1):
        return values, ValueInfo(nodata=nodata)
    offset = _UNSIGNED.get(values.dtype.str[1:])
    if scale == 1 and zero == offset:
        unsigned = values.view(f"u{values.dtype.itemsize}") ^ np.array(
            offset, values.dtype.str.replace("i", "u")
        )
        return unsigned, ValueInfo(nodata=nodata)
    scaled = (zero + scale * values.astype(np.float64)).astype(np.float32)
    return scaled, ValueInfo(nodata=None if nodata is None else float(np.float32(nodata)))
