"""How the values in image files become 8-bit channels, and checks of arrays.

Scientific images have any number of channels and use a sub-range of 16 bits or floats: 12-bit
microscopy, reflectances of a satellite from 0 to 10,000. A `PixelFormat` states which channels are
expected and which range of values becomes 0 to 255. It belongs to the weights, like mean and
standard deviation (`dino data stats` measures all of them).

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import Annotated, BinaryIO, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from dino.data.images.image_errors import ImageError
from dino.files import UserError
from dino.settings import Range, validated

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".npy", ".dcm", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf"),
    *(".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".sgi", ".rgb", ".rgba", ".bw", ".tga"),
    *(".icb", ".vda", ".vst", ".psd", ".qoi", ".dds", ".blp", ".ftc", ".ftu", ".pcx", ".dcx"),
    *(".pcd", ".pxr", ".ras", ".fit", ".fits", ".fli", ".flc", ".gbr", ".ico", ".cur"),
    *(".icns", ".msp", ".xbm", ".xpm", ".heic", ".heif", ".hif"),
)
"""Endings of image files, in any case: all that Pillow decodes, .npy, .dcm and HEIC.

PostScript is left out, which Pillow would run; IM, which it gives up; and what it only identifies:
video, metafiles, GRIB, BUFR, HDF5."""

MOST_BYTES = 2**29
"""Of a decoded image: as many as the largest RGB picture that Pillow opens, 178,956,970 pixels."""

_BLOCK = 2**22
"""Values that are turned into others at a time."""

CUT = "cut it into tiles, such as with gdal_retile or vips dzsave"
"""What to do with an image that is too large."""

Stream: TypeAlias = BinaryIO | BytesIO
"""An open binary file that can seek (checkers of types at run time know `BytesIO` by name only)."""

NoData: TypeAlias = Literal["nan"] | float | None
"""A value of pixels that hold none."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ValueInfo:
    """What a file says about its values, which stay as they are stored; see `PixelFormat.levels`.

    Attributes:
        bits: of integers; None for all bits of their type.
        inverted: whether the smallest value is white (MINISWHITE of TIFF, MONOCHROME1 of DICOM).
        nodata: the value of pixels that hold none.
        window: values that become 0 and 255 unless a range is given (VOI window of DICOM).
        channels: in the file, where the values have others (of a palette, or without alpha).
    """

    bits: int | None = None
    inverted: bool = False
    nodata: float | None = None
    window: tuple[float, float] | None = None
    channels: int | None = None


NO_INFO = ValueInfo()


@dataclass(frozen=True)
class PixelFormat:
    """What is expected of an image, and how its values become levels from 0 to 255.

    Args:
        channels: C. With 3, images of one channel are repeated in all three, and what is
            transparent becomes white. With 1, colour becomes grey. All others must have C.
        page: of a multi-page TIFF or a DICOM of several frames, counted from 0; of pages of one
            channel, the first of C. None takes the only page, or the channels that the file names.
        low: value that becomes 0, for each channel or one for all; None takes what the type
            offers: all of 8 and 16-bit integers, of all else the range of each image.
        high: value that becomes 255; given if and only if `low` is.
        nodata: value of pixels that hold none, as NaN always does; None for what the file says
            (GDAL's tag in TIFF, the padding of DICOM).

    Raises:
        UserError: if a value lies outside its range, naming it.
    """

    channels: Annotated[int, Range(low=1)] = 3
    page: Annotated[int, Range(low=0)] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    nodata: NoData = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        validated(self)
        if (self.low is None) != (self.high is None):
            raise UserError("a range of pixel values needs both low and high: give the other, too")
        if self.low is not None and self.high is not None:
            for bounds in (self.low, self.high):
                if len(bounds) not in (1, self.channels):
                    raise UserError(
                        f"{len(bounds)} bounds of pixel values do not fit {self.channels} "
                        "channels: give one for all, or one for each"
                    )
            if not all(low < high for low, high in np.broadcast(self.low, self.high)):
                raise UserError(f"low must lie below high: {self.low} and {self.high}")

    @property
    def plain(self) -> bool:
        """Whether these are Pillow's RGB pictures."""
        return replace(self, page=None) == RGB

    def levels(
        self, values: Shaped[np.ndarray, "C H W"], info: ValueInfo = NO_INFO
    ) -> UInt8[np.ndarray, "C H W"]:
        """Values of any type as 8-bit levels.

        With a range, what lies outside it becomes 0 or 255, and so do infinities. Pixels without
        data, as NaN always is, get the mean level of the others in their channel, 0 if there is
        none.
        """
        valid = self.valid(values, info)
        levels = by_rows(self._scale(values, info, valid), values)
        if not valid.all():
            levels = levels.copy()
            for channel, known in zip(levels, np.broadcast_to(valid, values.shape), strict=True):
                channel[~known] = round(float(channel[known].mean())) if known.any() else 0
        return levels

    def valid(
        self, values: Shaped[np.ndarray, "C H W"], info: ValueInfo = NO_INFO
    ) -> Bool[np.ndarray, ...]:
        """Which pixels hold data, for each channel: [C, H, W], or a single True for all."""
        nodata = info.nodata if self.nodata is None else self.nodata
        known = ~np.isnan(values) if values.dtype.kind == "f" else np.array(True)
        if nodata is None or nodata == "nan":
            return known
        with np.errstate(over="ignore"):
            return known & (values != nodata)

    def _scale(
        self, values: np.ndarray, info: ValueInfo, valid: np.ndarray
    ) -> Callable[[np.ndarray], np.ndarray]:
        """What makes levels of values: a function of each value and its channel alone."""
        kind, bits = values.dtype, info.bits
        if self.low is not None and self.high is not None:
            bounds = [np.reshape(np.array(b), (-1, 1, 1)) for b in (self.low, self.high)]
        elif info.window is not None:
            bounds = [np.array(bound) for bound in info.window]
        elif kind == np.bool_ or (kind.kind in "ui" and kind.itemsize <= 2):
            top = 1 if kind == np.bool_ else 2 ** (bits or 8 * kind.itemsize) - 1
            if top == 255 and kind == np.uint8:
                return np.invert if info.inverted else np.asarray
            start = (top + 1) // 2 if kind.kind == "i" else 0
            return partial(_full_range, top=top, start=start, inverted=info.inverted)
        else:
            finite = values[np.isfinite(values) & valid]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            if not low < high:
                return partial(np.zeros_like, dtype=np.uint8)
            bounds = [np.array(low), np.array(high)]
        black, white = reversed(bounds) if info.inverted else bounds
        return partial(_scaled, low=black, high=white)

    def with_channels(
        self, values: Shaped[np.ndarray, "stored H W"], name: str
    ) -> Shaped[np.ndarray, "C H W"]:
        """The image with the channels expected; an `ImageError` if it has others."""
        stored = len(values)
        if stored == self.channels:
            return values
        if stored == 1 and self.channels == 3:
            return np.broadcast_to(values, (3, *values.shape[1:]))
        reason = f"it has {stored} channel{'s' * (stored != 1)}, not {self.channels}"
        raise ImageError(name, f"{reason}: say --channels {stored} if all have as many", "misfit")


RGB = PixelFormat()
"""Three channels of 8 bits, and of all other values what their type offers."""


def by_rows(
    change: Callable[[np.ndarray], np.ndarray], values: Shaped[np.ndarray, "C H W"]
) -> Shaped[np.ndarray, "stored H W"]:
    """`change` of an image, a few rows at a time, so that what it computes with stays small."""
    rows = max(1, _BLOCK // max(1, values[:, :1].size))
    tops = range(0, values.shape[1], rows)
    if len(tops) <= 1:
        return change(values)
    return np.concatenate([change(values[:, top : top + rows]) for top in tops], axis=1)


def _full_range(values: np.ndarray, top: int, start: int, inverted: bool) -> np.ndarray:
    offsets = np.clip(values.astype(np.int32) + start, 0, top)
    return ((top - offsets if inverted else offsets) * 255 // top).astype(np.uint8)


def _scaled(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    # 16 bits are exact in float32; wider types need float64.
    kind = np.float64 if values.dtype.itemsize > 2 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        shares = (values.astype(kind) - low.astype(kind)) * (255 / (high - low)).astype(kind)
    levels: np.ndarray = np.rint(np.nan_to_num(np.clip(shares, 0, 255), nan=0)).astype(np.uint8)
    return levels


# ---------------------------------------------------------------------------------- kinds
_HEIF = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx", b"ftypmif1", b"ftypmsf1")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# The first element of a DICOM data set without its preamble: group 2 or 8, then an explicit type,
# or the length of a short value.
_BARE_DICOM = re.compile(rb"[\2\x08]\0.\0([A-Z]{2}|[^\0]\0\0\0)", re.DOTALL)


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts with these 132 bytes is a DICOM file."""
    return start[128:132] == b"DICM" or bool(_BARE_DICOM.match(start))


def kind_of(
    stream: Stream, name: str
) -> Literal["picture", "npy", "tiff", "dicom", "heif", "fits"]:
    """The format by its first bytes, where it may be more than a picture.

    Raises:
        ImageError: for an empty file.
    """
    stream.seek(0)
    start = stream.read(132)
    stream.seek(0)
    if not start:
        raise ImageError(name, "it is empty", "empty")
    if is_dicom(start):  # looked at first, since its preamble may be that of a TIFF
        return "dicom"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"SIMPLE  ="):
        return "fits"
    if start[4:12] in _HEIF and b"avif" not in start[:64]:
        return "heif"
    return "tiff" if start.startswith(_TIFF) else "picture"


# ---------------------------------------------------------------------------------- checks
def channels_first(values: np.ndarray, name: str, expected: PixelFormat) -> np.ndarray:
    """An array [H, W], [H, W, C] or [C, H, W] as [C, H, W].

    Raises:
        ImageError: if it has neither two nor three axes, or no pixel, or holds no real numbers.
    """
    check_kind(name, values.dtype)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ImageError(name, f"an array of shape {values.shape} is no image", "misfit")
    first, last = values.shape[0], values.shape[-1]
    if (
        values.ndim == 3
        and last != expected.channels
        and (first == expected.channels or first < last)
    ):
        return values
    return planes(values)


def planes(values: np.ndarray) -> Shaped[np.ndarray, "C H W"]:
    """An array [H, W] or [H, W, C] as [C, H, W]."""
    return values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)


def check_kind(name: str, dtype: np.dtype) -> None:
    """Raise an `ImageError` for a type that is neither integer, float nor boolean."""
    if dtype.kind not in "buif":
        raise ImageError(name, f"an array of {dtype} is no image", "misfit")


def check_size(name: str, values: int, item: int = 1) -> None:
    """Raise an `ImageError` for an image of more than `MOST_BYTES`.

    Args:
        name: of the image.
        values: in all channels.
        item: bytes of each.
    """
    if (taken := values * item) > MOST_BYTES:
        found = f"decoded it takes {taken / 2**20:,.0f} MiB, more than {MOST_BYTES / 2**20:,.0f}"
        raise ImageError(name, f"{found}: {CUT}", "too large")
