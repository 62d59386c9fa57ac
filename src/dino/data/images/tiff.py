"""TIFF by tifffile: all but the plain pages that Pillow reads as they are stored.

Photometric interpretation, planes, orientation, bits of the values and the axes of series of pages
(OME, ImageJ) are read from the tags (TIFF 6.0).

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from dino.data.images.bit_depth import grey, upright
from dino.data.images.image_errors import ImageError, missing_extra
from dino.data.images.pixel_format import (
    PixelFormat,
    Stream,
    ValueInfo,
    by_rows,
    check_kind,
    check_size,
)

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
_SAMPLES = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _CIELAB: 3}
_BY_PILLOW = {_MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR}
_JPEG = (6, 7, 33007, 34892)  # compressions that tifffile decodes to RGB
_NODATA = 42113  # of GDAL, a text
# From X, Y, Z relative to D50 (each white is 1) to linear sRGB, adapted by Bradford's matrix.
_SRGB_OF_D50 = np.array(
    [
        (3.1338561, -1.6168667, -0.4906146),
        (-0.9787684, 1.9161415, 0.0334540),
        (0.0719453, -0.2289914, 1.4052427),
    ]
) * (0.96422, 1.0, 0.82521)
_SEVERAL = {"generic", "ome", "shaped", "uniform"}
"""Of tifffile's kinds of series those of which the first is not known to be the image."""
_CHOOSE = "choose one by --page NUMBER, from 0, or take all as images, by --data 'FOLDER?pages=all'"
_AXES = {"Z": "depth", "T": "time"}


def pillow_reads(
    picture: Image.Image, name: str, pixels: PixelFormat, separate: bool = False
) -> bool:
    """Whether Pillow reads a TIFF as it is stored: contiguous samples of 1 or 8 unsigned bits.

    Args:
        picture: opened, at its page.
        name: in messages.
        pixels: channels and page expected.
        separate: take samples in planes, too.

    Raises:
        ImageError: if the page or a tile is absurdly large.
        ValueError: if the file is damaged.
    """
    tags: Any = picture.tag_v2  # type: ignore[attr-defined]
    samples, planar, *tile = (tags.get(tag, 1) for tag in (277, 284, 322, 323))
    if not all(isinstance(value, int) for value in (samples, planar, *tile)):
        raise ValueError("its tags are damaged")
    check_size(name, samples * max(math.prod(tile), picture.width * picture.height))
    places = [value for tag in (273, 279, 324, 325) for value in np.atleast_1d(tags.get(tag, 1))]
    bits, formats = ({*np.atleast_1d(tags.get(tag, 1)).tolist()} for tag in (258, 339))
    photometric = tags.get(262)
    return bool(
        (bits == {1} or (bits == {8} and photometric in _BY_PILLOW))
        and formats <= {1, 4}
        and planar in ((1, 2) if separate else (1,))
        and 0 not in places  # of a sparse file, where Pillow would read its header as pixels
        and samples == _SAMPLES.get(photometric)
        and _NODATA not in tags
        and (pixels.channels in (1, 3) or samples > 1)
        and (pixels.page is not None or not getattr(picture, "is_animated", False))
    )


def read_tiff(
    file: Stream, name: str, expected: PixelFormat
) -> tuple[Shaped[np.ndarray, "C H W"], ValueInfo]:
    """A TIFF by tifffile, upright: samples of a page, or pages that are channels.

    Raises:
        ImageError: if there is no such page, several of which none is chosen, colours that cannot
            be converted, the image is absurdly large, or tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise missing_extra(name, "it is a TIFF that only tifffile reads", "tiff") from None
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        if not tiff.pages:
            raise ValueError("it has no page")
        parts, axes = _chosen(tiff, name, expected)
        pages = [
            page for part in parts for page in filter(None, getattr(part, "pages", None) or [part])
        ]
        page = pages[0].keyframe
        check_kind(name, page.dtype)
        item = 6 if page.photometric == _PALETTE else page.dtype.itemsize
        check_size(name, len(parts) * math.prod(parts[0].shape), item)
        for each in pages:
            _check_tiles(each, name)
        arrays = [part.asarray().reshape(part.shape) for part in parts]
        stacked = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
        values = _channels_first(stacked, f"C{axes}", name)
        found = _colours(values, page, name, expected)
        return upright(found, page.tags.valueof(274, 1)), _info(page, len(values))


def count_pages(file: Stream) -> int:
    """The number of pages of a TIFF; 1 without tifffile."""
    try:
        import tifffile
    except ImportError:
        return 1
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        return len(tiff.pages)


# ---------------------------------------------------------------------------------- pages and axes
def _chosen(tiff: Any, name: str, expected: PixelFormat) -> tuple[Sequence[Any], str]:
    """The pages, or the series of pages, that hold an image, and the axes of each."""
    count, first = len(tiff.pages), expected.page
    if first is not None:
        if first >= count:
            raise ImageError(name, f"it has {count} pages, no {first}", "misfit")
        page, last = tiff.pages[first], first + expected.channels
        several = expected.channels != 3 and page.samplesperpixel == 1 and last <= count
        return [tiff.pages[at] for at in range(first, last)] if several else [page], page.axes
    images = [one for one in tiff.series if not _is_secondary(one.keyframe)] or tiff.series
    series = images[0]
    if len(images) > 1 and series.kind in _SEVERAL:
        kinds = f"{len(images)} images of different sizes or kinds"
        raise ImageError(name, f"it holds {kinds}: {_CHOOSE}", "misfit")
    axes, sizes = series.axes, dict.fromkeys("SC", 1)
    others: list[tuple[str, int]] = []
    for axis, size in zip(axes, series.shape, strict=True):
        if axis in "SC":
            sizes[axis] = size
        elif axis not in "YX" and size > 1:
            others.append((axis, size))
    # Pages of no stated meaning are channels if there are as many as were requested.
    if [axis in _AXES for axis, _ in others] == [False] and expected.channels != 3:
        ((axis, size),) = others
        if (sizes["S"] * sizes["C"], size) == (1, expected.channels):
            return [series], axes
    if others:
        found = ", ".join(f"{size} in {_AXES.get(axis, 'pages')}" for axis, size in others)
        raise ImageError(name, f"it is a stack of {count} pages ({found}): {_CHOOSE}", "misfit")
    if None in series.pages:
        raise ImageError(name, "some of its channels lie in other files: join them", "misfit")
    channels = sizes["S"] * sizes["C"]
    if sizes["C"] > 1 and channels != expected.channels:
        reason = (
            f"it has {channels} channels, not {expected.channels}: say --channels {channels} if "
            "all have as many, or choose one by --page NUMBER, from 0"
        )
        raise ImageError(name, reason, "misfit")
    return [series], axes


def _is_secondary(page: Any) -> bool:
    """Whether a page is a thumbnail, an overview or a mask of another one."""
    return bool(page.is_reduced or page.is_mask)


def _channels_first(values: np.ndarray, axes: str, name: str) -> np.ndarray:
    """Values with named axes as [C, H, W]: all axes but Y and X are channels."""
    if not {"Y", "X"} <= set(axes) or 0 in values.shape:
        raise ImageError(name, f"an array of axes {axes} is no image", "misfit")
    rows, columns = (axes.index(axis) for axis in "YX")
    return np.moveaxis(values, (rows, columns), (-2, -1)).reshape(
        -1, values.shape[rows], values.shape[columns]
    )


def _check_tiles(page: Any, name: str) -> None:
    """Refuse a page whose strips or tiles are absurdly large, or are not all there."""
    check_size(name, math.prod(page.keyframe.chunks), page.keyframe.dtype.itemsize)
    # tifffile would fill in zeros: minutes for a length that damage made millions
    if not page.is_contiguous and len(page.dataoffsets) < math.prod(page.keyframe.chunked):
        raise ValueError("not all of its strips or tiles are there")


# ---------------------------------------------------------------------------------- values
def _info(page: Any, channels: int) -> ValueInfo:
    palette = page.photometric == _PALETTE
    bits, nodata = page.bitspersample, None
    with suppress(TypeError, ValueError):  # absent, or no number
        nodata = float(page.tags.valueof(_NODATA))
    return ValueInfo(
        bits=bits if page.dtype.kind in "ui" and not palette else None,
        inverted=page.photometric == _MINISWHITE,
        nodata=None if palette else nodata,
        channels=3 if palette else channels,
    )


def _colours(
    values: Shaped[np.ndarray, "stored H W"], page: Any, name: str, expected: PixelFormat
) -> Shaped[np.ndarray, "C H W"]:
    """Where 1 or 3 channels are expected, colours as RGB or grey; opaque alpha is left out."""
    photometric = int(page.photometric)
    if photometric not in _SAMPLES:
        kind = getattr(page.photometric, "name", photometric)
        raise ImageError(name, f"its colours are {kind}: convert it to RGB or grey", "misfit")
    if photometric == _PALETTE:
        values = np.asarray(page.colormap)[:, values[0]]
    elif expected.channels in (1, 3):
        top = 1.0 if values.dtype.kind == "f" else 2.0**page.bitspersample - 1
        if len(values) == _SAMPLES[photometric] + 1 and page.extrasamples[:1] in ((1,), (2,)):
            values = _without_alpha(values, top, name)
        if len(values) != _SAMPLES[photometric]:
            return values
        if photometric == _CMYK:
            values = by_rows(partial(_rgb_of_cmyk, top=top), values)
        elif photometric == _CIELAB:
            values = by_rows(partial(_rgb_of_lab, top=top), values)
        elif photometric == _YCBCR and page.compression not in _JPEG:
            raise ImageError(name, "its colours are YCbCr: convert it to RGB", "misfit")
    return by_rows(grey, values) if expected.channels == 1 else values


def _without_alpha(values: np.ndarray, top: float, name: str) -> np.ndarray:
    if (values[-1] != top).any():
        reason = (
            f"the last of its {len(values)} channels is marked as transparency, but may be a band, "
            f"such as near infrared: say --channels {len(values)} to learn from all of them, or "
            "write the files without it"
        )
        raise ImageError(name, reason, "misfit")
    return values[:-1]


def _rgb_of_cmyk(values: np.ndarray, top: float) -> np.ndarray:
    inks = values / top
    return _rounded((1 - inks[:3]) * (1 - inks[3:]) * top, values.dtype)


def _rgb_of_lab(values: np.ndarray, top: float) -> np.ndarray:
    """CIELAB relative to D50, as TIFF stores it (TIFF 6.0, section 23), as sRGB (IEC 61966-2-1)."""
    signed = values[1:].view(f"i{values.dtype.itemsize}")
    a, b = signed / (top + 1) * 256
    y = (values[0] * (100 / top) + 16) / 116
    cubes = np.stack([y + a / 500, y, y - b / 200])
    xyz = np.where(cubes > 6 / 29, cubes**3, (cubes - 4 / 29) * 3 * (6 / 29) ** 2)
    linear = np.clip(np.tensordot(_SRGB_OF_D50, xyz, 1), 0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return _rounded(curve * top, values.dtype)


def _rounded(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    return (values if kind.kind == "f" else np.rint(values)).astype(kind)
