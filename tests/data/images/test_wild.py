"""A table of scientific files: what each is read as, against an independent reader."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from helpers.dicoms import dicom
from helpers.reading import levels, misfit
from hypothesis import given
from hypothesis import strategies as st

from dino.data.images.bit_depth import Stored
from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat

RAMP = (np.arange(64 * 80).reshape(64, 80) % 4096).astype(np.uint16)
COLOUR = np.stack([RAMP, 4095 - RAMP, RAMP // 2], axis=2)
HEIGHTS = np.where(RAMP < 1000, -32768, RAMP // 8).astype(np.int16)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile.imwrite(stream := io.BytesIO(), values, **options)
    return stream.getvalue()


def planar_of_one_sample(values: np.ndarray) -> bytes:
    """As GDAL writes one band with INTERLEAVE=BAND: planes, of which there is one."""
    tags = [(284, "H", 1, 2, True)]
    return tiff(values, photometric="minisblack", extratags=tags, metadata=None)


def scan(values: np.ndarray, **fields: Any) -> bytes:
    dicom(stream := io.BytesIO(), values, **fields)
    return stream.getvalue()


def by_tifffile(content: bytes) -> np.ndarray:
    values = tifffile.imread(io.BytesIO(content))
    return np.moveaxis(values, 2, 0) if values.shape[-1] in (3, 4) else np.atleast_3d(values.T).T


def by_pydicom(content: bytes) -> np.ndarray:
    return pydicom.dcmread(io.BytesIO(content)).pixel_array[None].astype(np.float32)


def by_numpy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def by_libpng(content: bytes) -> np.ndarray:
    return np.moveaxis(imagecodecs.png_decode(content), 2, 0)


def npy(values: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), values)
    return stream.getvalue()


class File(NamedTuple):
    content: bytes
    read: Callable[[bytes], np.ndarray]
    stored: Stored
    white: float
    """The value that becomes 255 without a range; 0 and it are exchanged where 0 is white."""
    inverted: bool = False


COMPOSITE = (np.stack([RAMP, RAMP * 2, RAMP * 3]) % 200).astype(np.uint8)
FILES = {
    "be.npy": File(
        npy(COMPOSITE.astype(">u2")), by_numpy, Stored(3, 16, False), 65535
    ),
    "rgb, 12 bits.tif": File(
        tiff(COLOUR, photometric="rgb", bitspersample=12),
        by_tifffile, Stored(3, 12, False), 4095,
    ),
    "webp.tif": File(
        tiff((COLOUR // 16).astype(np.uint8), photometric="rgb", compression="webp"),
        by_tifffile, Stored(3, 8, False), 255,
    ),
    "imagej composite.tif": File(
        tiff(COMPOSITE, imagej=True, metadata={"axes": "CYX"}),
        by_tifffile, Stored(3, 8, False), 255,
    ),
    "miniswhite, 16 bits.tif": File(
        tiff(RAMP, photometric="miniswhite"), by_tifffile, Stored(1, 16, False), 65535, True
    ),
    "one sample in planes.tif": File(
        planar_of_one_sample(RAMP), by_tifffile, Stored(1, 16, False), 65535
    ),
    "one float in planes, big-endian.tif": File(
        tiff(
            RAMP.astype(np.float32), photometric="minisblack", byteorder=">", metadata=None,
            extratags=[(284, "H", 1, 2, True)],
        ),
        by_tifffile, Stored(1, 32, True), 4095,
    ),
    "rgb, 16 bits.tif": File(
        tiff(COLOUR, photometric="rgb"), by_tifffile, Stored(3, 16, False), 65535
    ),
    "rgb, 16 bits.png": File(
        imagecodecs.png_encode(COLOUR), by_libpng, Stored(3, 16, False), 65535
    ),
    "plain.dcm": File(scan(RAMP), by_pydicom, Stored(1, 16, False), 4095),
    "monochrome1.dcm": File(
        scan(RAMP, PhotometricInterpretation="MONOCHROME1"),
        by_pydicom, Stored(1, 16, False), 4095, True,
    ),
    "preamble of a tiff.dcm": File(
        b"II*\0" + scan(RAMP)[4:], by_pydicom, Stored(1, 16, False), 4095
    ),
    "empty window.dcm": File(
        scan(RAMP, WindowCenter="", WindowWidth=""), by_pydicom, Stored(1, 16, False), 4095
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_the_values_of_an_independent_reader(name: str) -> None:
    file = FILES[name]
    expected = file.read(file.content)
    with open_image(io.BytesIO(file.content), name) as image:
        assert image.stored == file.stored
        assert image.values().dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(image.values(), expected)
    shares = expected / file.white
    shares = np.broadcast_to(1 - shares if file.inverted else shares, (3, *shares.shape[1:]))
    assert np.abs(levels(io.BytesIO(file.content)) - 255 * shares).max() <= 1
    bounds = np.clip(expected / 200, 0, 1)
    bounds = np.broadcast_to(1 - bounds if file.inverted else bounds, shares.shape)
    found = levels(io.BytesIO(file.content), low=(0.0,), high=(200.0,))
    assert np.abs(found - 255 * bounds).max() <= 1


def test_what_has_no_three_channels_is_refused_by_name() -> None:
    bands = np.stack([RAMP % 70] * 4, axis=2).astype(np.uint8)
    near_infrared = tiff(bands, photometric="rgb", extrasamples=["unassalpha"])
    assert "say --channels 4" in misfit(io.BytesIO(near_infrared))
    depth = tiff(np.stack([RAMP] * 5), imagej=True, metadata={"axes": "ZYX"})
    assert "a stack of 5 pages (5 in depth)" in misfit(io.BytesIO(depth))


def test_a_margin_without_data_has_the_mean() -> None:
    tags = [(42113, "s", 0, "-32768", True)]
    content = tiff(HEIGHTS, photometric="minisblack", extratags=tags, metadata=None)
    known = HEIGHTS != -32768
    found = levels(io.BytesIO(content), 1, low=(0.0,), high=(512.0,))[0]
    assert np.abs(found[known] - HEIGHTS[known] * (255 / 512)).max() <= 0.5
    assert np.abs(found[~known] - HEIGHTS[known].mean() * (255 / 512)).max() <= 1


def test_a_report_in_dicom_is_no_image() -> None:
    data = pydicom.dcmread(io.BytesIO(scan(RAMP)))
    for name in ("Rows", "Columns", "PixelData"):
        delattr(data, name)
    data.save_as(stream := io.BytesIO())
    with pytest.raises(ImageError) as caught:
        levels(stream)
    assert caught.value.defect == "not an image"


# ---------------------------------------------------------------------------------- PNG, JPEG 2000
@given(
    kind=st.sampled_from(["png", "jp2"]),
    bits=st.sampled_from([8, 9, 10, 12, 14, 15, 16]),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 99),
)
def test_png_and_jpeg_2000_keep_their_bits(kind: str, bits: int, channels: int, seed: int) -> None:
    bits = {8: 8}.get(bits, 16) if kind == "png" else bits
    random = np.random.default_rng(seed)
    values = random.integers(0, 2**bits, (12, 10, channels)).astype("u1" if bits == 8 else "u2")
    values[0, 0], values[..., 3:] = 2**bits - 1, 2**bits - 1  # white, and opaque
    stored = np.ascontiguousarray(values.squeeze())
    content = (
        imagecodecs.png_encode(stored)
        if kind == "png"
        else imagecodecs.jpeg2k_encode(stored, level=0, bitspersample=bits)
    )
    expected = np.moveaxis(values, 2, 0)
    with open_image(io.BytesIO(content), kind, PixelFormat(channels)) as image:
        assert image.stored == Stored(channels, bits, False)
        if channels != 3 or bits > 8:
            assert np.array_equal(image.values(), expected)
    shares = np.broadcast_to(expected[:3], (3, 12, 10)) / (2**bits - 1)
    assert np.abs(levels(io.BytesIO(content)) - 255 * shares).max() <= 1
