"""Image files that Pillow does not read, or not in full: .npy, TIFF and DICOM.

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import (
    PixelFormat,
    Stream,
    channels_first,
    check_kind,
    check_size,
)
from dino.files import UserError

_TAGS = {277: 1, 284: 1, 322: 1, 323: 1}  # samples, planes, width and length of tiles: defaults


def read_npy(file: Stream, name: str, expected: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A `.npy` array [H, W], [H, W, C] or, if the last axis is not C and the first is, [C, H, W].

    Raises:
        ImageError: if it is another array, or objects, which only a pickle could restore.
        ValueError: if the file is damaged.
    """
    headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    version, _ = np.lib.format.read_magic(file)
    if version not in headers:
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = headers[version](file)
    check_kind(name, dtype)
    check_size(name, math.prod(shape))
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    content = file.read(math.prod(shape) * dtype.itemsize + 1)
    flat = np.frombuffer(content, dtype)  # raises ValueError for an incomplete value
    values = flat.reshape(shape, order="F" if fortran else "C")
    return channels_first(values.astype(dtype.newbyteorder("="), copy=False), name, expected)


def read_tiff(file: Stream, name: str, expected: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
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
        if not tiff.pages:
            raise ValueError("it has no page")
        if not expected.page < len(tiff.pages):
            raise ImageError(name, f"it has {len(tiff.pages)} pages, no {expected.page}", "misfit")
        page = tiff.pages[expected.page]
        # Several pages of one grey value each may be the channels of one image.
        series = tiff.series[0] if expected.page == 0 and tiff.series else page
        chosen = series if series.ndim == 3 and expected.channels in series.shape else page
        check_size(name, math.prod(chosen.shape))
        pages: Any = [page] if chosen is page else chosen.pages
        for each in filter(None, pages):
            _check_tiles(each, name)
        values = chosen.asarray()
    return channels_first(values, name, expected)


def _check_tiles(page: Any, name: str) -> None:
    """Refuse a page whose strips or tiles are absurdly large, or are not all there."""
    check_size(name, math.prod(page.keyframe.chunks))
    # tifffile would fill in zeros: minutes for a length that damage made millions
    if not page.is_contiguous and len(page.dataoffsets) < math.prod(page.keyframe.chunked):
        raise ValueError("not all of its strips or tiles are there")


def beyond_pillow(picture: Image.Image, name: str) -> bool:
    """Whether Pillow has opened a TIFF but would read other values than it holds.

    Of samples that lie in separate planes it takes the first for all, or bytes for words; of
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


def read_dicom(file: Stream, name: str, expected: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A DICOM image in its units (such as Hounsfield), by pydicom.

    Dark on bright (MONOCHROME1) is inverted by its sign. Without a range of values in `expected`,
    the file's window, if it has one, becomes 0 to 255.

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
    if not expected.page < frames:
        raise ImageError(name, f"it has {frames} frames, no {expected.page}", "misfit")
    check_size(name, int(data.Rows) * int(data.Columns) * frames)
    pixels = data.pixel_array
    values = pixels[expected.page] if frames > 1 else pixels
    if data.get("SamplesPerPixel", 1) == 1:
        values = np.asarray(apply_modality_lut(values, data), dtype=np.float32)
        sign = -1.0 if data.get("PhotometricInterpretation") == "MONOCHROME1" else 1.0
        values = sign * values
        if expected.low is None and (window := _window(data)) is not None:
            low, high = sorted((sign * window[0], sign * window[1]))
            values = PixelFormat(1, low=(low,), high=(high,)).levels(values[None])[0]
    return channels_first(values, name, expected)


def _window(data: Any) -> tuple[float, float] | None:
    """From and to of the first window that a DICOM file proposes."""
    keys = ("WindowCenter", "WindowWidth")
    if not all(key in data for key in keys):
        return None
    centre, width = (float(np.atleast_1d(data[key].value)[0]) for key in keys)
    return (centre - width / 2, centre + width / 2) if width > 0 else None
