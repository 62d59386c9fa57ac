"""How the values in image files become 8-bit channels, and the files that Pillow does not read.

Scientific images come with any number of channels and in 16 bits, integers or floats, of which they
use a part: 12-bit microscopy, reflectances of a satellite from 0 to 10,000. A `PixelFormat` says
which channels are expected and which range of values becomes 0 to 255. It belongs to the weights,
like mean and standard deviation (`dino data stats` measures all of them).

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dino.data.images.image_errors import ImageError
from dino.files import UserError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".npy",
    ".dcm",
)
"""Names of files that count as images, in any case."""

Stream: TypeAlias = BinaryIO | BytesIO
"""An open binary file that can seek (checkers of types at run time know `BytesIO` by name only)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelFormat:
    """What is expected of an image, and how its values become levels from 0 to 255.

    Args:
        channels: C, 1 or more. With 3, images of one channel are repeated in all three, and what
            is transparent becomes white. With 1, colour becomes grey. All others must have C.
        page: of a multi-page TIFF or a DICOM of several frames, counted from 0.
        low: value that becomes 0, for each channel or one for all; None takes what the type
            offers: whole integers of 8 and 16 bits, of all else each image's own range.
        high: value that becomes 255; given if and only if `low` is.

    Raises:
        UserError: if a value lies outside its range, naming it.
    """

    channels: int = 3
    page: int = 0
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.channels < 1:
            raise UserError(f"channels must be 1 or more, not {self.channels}")
        if self.page < 0:
            raise UserError(f"page must be 0 or more, not {self.page}")
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PixelFormat:
        """The inverse of `dataclasses.asdict`, also after a journey through JSON.

        Raises:
            UserError: if a name is unknown.
        """
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise UserError(f"unknown settings of a pixel format: {', '.join(unknown)}")
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**settings)

    @property
    def plain(self) -> bool:
        """Whether Pillow's RGB is all that is wanted."""
        return self == PixelFormat()

    def levels(self, values: Shaped[np.ndarray, "C H W"]) -> UInt8[np.ndarray, "C H W"]:
        """Values of any type as 8-bit levels.

        With a range, what lies outside it becomes 0 or 255, and so do infinities; NaN becomes 0.
        """
        if self.low is not None and self.high is not None:
            bounds = (np.reshape(np.array(b), (-1, 1, 1)) for b in (self.low, self.high))
            return _scaled(values, *bounds)
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.bool_:
            return np.where(values, np.uint8(255), np.uint8(0))
        if values.dtype == np.uint16:
            return (values // 257).astype(np.uint8)
        if values.dtype == np.int16:
            return ((values.astype(np.int32) + 2**15) // 257).astype(np.uint8)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if not low < high:
            return np.zeros(values.shape, np.uint8)
        return _scaled(values, np.array(low), np.array(high))

    def fit(self, values: Shaped[np.ndarray, "own H W"], name: str) -> np.ndarray:
        """The image with the channels expected.

        Raises:
            ImageError: if it has others.
        """
        own = len(values)
        if own == self.channels:
            return values
        if own == 1 and self.channels == 3:
            return np.broadcast_to(values, (3, *values.shape[1:]))
        words = f"it has {own} channel{'s' * (own != 1)}, not {self.channels}"
        raise ImageError(name, f"{words}: say --channels {own} if all have as many", "misfit")


RGB = PixelFormat()
"""Three channels of 8 bits, and of all other values what their type offers."""


def _scaled(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    # 16 bits are exact in float32; wider types keep what they have.
    kind = np.float64 if values.dtype.itemsize > 2 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        shares = (values.astype(kind) - low.astype(kind)) * (255 / (high - low)).astype(kind)
    levels: np.ndarray = np.rint(np.nan_to_num(np.clip(shares, 0, 255), nan=0)).astype(np.uint8)
    return levels


# ---------------------------------------------------------------------------------- readers
_TAGS = {277: 1, 284: 1, 322: 1, 323: 1}  # samples, planes, width and length of tiles: defaults
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def kind_of(stream: Stream, name: str) -> Literal["picture", "npy", "tiff", "dicom"]:
    """What the first bytes say, for the formats that may be more than pictures.

    Raises:
        ImageError: if there are none.
    """
    stream.seek(0)
    start = stream.read(132)
    stream.seek(0)
    if not start:
        raise ImageError(name, "it is empty", "empty")
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(_TIFF):
        return "tiff"
    return "dicom" if start[128:132] == b"DICM" else "picture"


def read_npy(file: Stream, name: str, wanted: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A `.npy` array [H, W], [H, W, C] or, if the last axis is not C and the first is, [C, H, W].

    Raises:
        ImageError: if it is another array, or objects, which only a pickle could restore.
        ValueError: if the file is damaged.
    """
    version = np.lib.format.read_magic(file)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if header is None:
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = header(file)
    check_kind(name, dtype)
    check_size(name, math.prod(shape))
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    content = file.read(math.prod(shape) * dtype.itemsize + 1)
    flat = np.frombuffer(content, dtype)  # raises ValueError for a part of a value
    values = flat.reshape(shape, order="F" if fortran else "C")
    return channels_first(values.astype(dtype.newbyteorder("="), copy=False), name, wanted)


def read_tiff(file: Stream, name: str, wanted: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A TIFF by tifffile: any number of channels, as samples of a page or as pages of a series.

    Raises:
        ImageError: if there is no such page, or the image is absurdly large.
        UserError: if tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{name} is a TIFF that only tifffile reads: pip install 'dino-ssl[tiff]'"
        ) from None
    with tifffile.TiffFile(file) as tiff:
        if not wanted.page < len(tiff.pages):
            raise ImageError(name, f"it has {len(tiff.pages)} pages, no {wanted.page}", "misfit")
        page = tiff.pages[wanted.page]
        # Several pages of one grey value each may be the channels of one image.
        series = tiff.series[0] if wanted.page == 0 and tiff.series else page
        chosen = series if series.ndim == 3 and wanted.channels in series.shape else page
        check_size(name, math.prod(chosen.shape))
        parts: Any = [page] if chosen is page else chosen.pages
        for part in filter(None, parts):
            _check_parts(part, name)
        values = chosen.asarray()
    return channels_first(values, name, wanted)


def _check_parts(page: Any, name: str) -> None:
    """Refuse a page whose strips or tiles are absurdly large, or are not all there.

    For each that is missing tifffile would fill in zeros: minutes for a length that damage made
    millions.
    """
    keyframe = page.keyframe
    check_size(name, math.prod(keyframe.chunks))
    if not page.is_contiguous and len(page.dataoffsets) < math.prod(keyframe.chunked):
        raise ValueError("not all of its strips or tiles are there")


def beyond_pillow(picture: Image.Image, name: str) -> bool:
    """Whether Pillow has opened a TIFF but would read other values than it holds.

    Of samples that lie in planes of their own it takes the first for all, or bytes for words; of
    samples beyond its modes it knows nothing.

    Raises:
        ImageError: if a tile is absurdly large.
        ValueError: if the file is damaged.
    """
    if picture.format != "TIFF":
        return False
    tags: Any = picture.tag_v2  # type: ignore[attr-defined]
    samples, planes, *tile = (tags.get(tag, usual) for tag, usual in _TAGS.items())
    if not all(isinstance(value, int) for value in (samples, planes, *tile)):
        raise ValueError("its tags are damaged")
    check_size(name, samples * math.prod(tile))
    return bool(samples > 1 and (planes == 2 or samples != len(picture.getbands())))


def read_dicom(file: Stream, name: str, wanted: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A DICOM image in its own units (such as Hounsfield), by pydicom.

    Dark on bright (MONOCHROME1) is turned over by its sign. Without a range of values in `wanted`,
    the file's own window, if it has one, becomes 0 to 255.

    Raises:
        ImageError: if there is no such frame, or the image is absurdly large.
        UserError: if pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut
    except ImportError:
        raise UserError(f"{name} is a DICOM image: pip install 'dino-ssl[dicom]'") from None
    data = pydicom.dcmread(file)
    frames = int(data.get("NumberOfFrames", None) or 1)
    if not wanted.page < frames:
        raise ImageError(name, f"it has {frames} frames, no {wanted.page}", "misfit")
    check_size(name, int(data.Rows) * int(data.Columns) * frames)
    pixels = data.pixel_array
    values = pixels[wanted.page] if frames > 1 else pixels
    if data.get("SamplesPerPixel", 1) == 1:
        values = np.asarray(apply_modality_lut(values, data), dtype=np.float32)
        sign = -1.0 if data.get("PhotometricInterpretation") == "MONOCHROME1" else 1.0
        values = sign * values
        if wanted.low is None and (window := _window(data)) is not None:
            low, high = sorted((sign * window[0], sign * window[1]))
            values = PixelFormat(1, low=(low,), high=(high,)).levels(values[None])[0]
    return channels_first(values, name, wanted)


def _window(data: Any) -> tuple[float, float] | None:
    """From and to of the first window that a DICOM file proposes."""
    if "WindowCenter" not in data or "WindowWidth" not in data:
        return None
    centre, width = (
        float(np.atleast_1d(data[key].value)[0]) for key in ("WindowCenter", "WindowWidth")
    )
    return (centre - width / 2, centre + width / 2) if width > 0 else None


def channels_first(values: np.ndarray, name: str, wanted: PixelFormat) -> np.ndarray:
    """An array [H, W], [H, W, C] or [C, H, W] as [C, H, W].

    Raises:
        ImageError: if it has neither two nor three axes, or no pixel, or holds no real numbers.
    """
    check_kind(name, values.dtype)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ImageError(name, f"an array of shape {values.shape} is no image", "misfit")
    if values.ndim == 2:
        return values[None]
    first, last = values.shape[0], values.shape[2]
    if last != wanted.channels and (first == wanted.channels or first < last):
        return values
    return np.moveaxis(values, 2, 0)


def check_kind(name: str, dtype: np.dtype) -> None:
    """Refuse what is neither whole nor real numbers nor truth values.

    Raises:
        ImageError: naming the type.
    """
    if dtype.kind not in "buif":
        raise ImageError(name, f"an array of {dtype} is no image", "misfit")


def check_size(name: str, values: int) -> None:
    """Refuse what Pillow refuses as a decompression bomb: more than 2 x `MAX_IMAGE_PIXELS`.

    Raises:
        ImageError: if there are so many values.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and values > 2 * limit:
        raise ImageError(name, f"it has {values:,} values, more than {2 * limit:,}", "too large")
