"""Colour of more than 8 bits a channel, which Pillow cuts to 8, in every format that has it."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from dino.data.commands.check import check
from dino.data.commands.stats import measure
from dino.data.images.bit_depth import Stored
from dino.data.images.decode import as_pixels, open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.open import open_source

TWELVE = np.random.default_rng(0).integers(0, 4096, (12, 10, 4), dtype=np.uint16)
TWELVE[..., 3] = 65535  # opaque where it is transparency
RANGE = PixelFormat(3, low=(0.0,), high=(4095.0,))


def tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile.imwrite(stream := io.BytesIO(), values, **options)
    return stream.getvalue()


def jpeg2000(values: np.ndarray, bits: int) -> bytes:
    encoded: bytes = imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits)
    return encoded


def sgi(values: np.ndarray) -> bytes:
    height, width, channels = values.shape
    header = struct.pack(">hBBHHHH", 474, 0, 2, 3, width, height, channels).ljust(512, b"\0")
    return header + np.moveaxis(values[::-1], 2, 0).astype(">u2").tobytes()


COLOUR = np.ascontiguousarray(TWELVE[..., :3])
FILES = {
    "rgb.png": imagecodecs.png_encode(COLOUR),
    "rgba.png": imagecodecs.png_encode(TWELVE),
    "rgb.tif": tiff(COLOUR, photometric="rgb"),
    "big-endian.tif": tiff(COLOUR, photometric="rgb", byteorder=">"),
    "deflate.tif": tiff(COLOUR, photometric="rgb", compression="zlib", predictor=True),
    "rgba.tif": tiff(TWELVE, photometric="rgb", extrasamples=["unassalpha"]),
    "rgb.jp2": jpeg2000(COLOUR, 16),
}


def values(content: bytes, pixels: PixelFormat = RGB) -> np.ndarray:
    with open_image(io.BytesIO(content), "a", pixels) as image:
        return image.values()


@pytest.mark.parametrize("name", FILES)
def test_a_range_finds_all_bits(name: str) -> None:
    assert np.array_equal(values(FILES[name]), COLOUR.transpose(2, 0, 1))
    levels = as_pixels(read_image(io.BytesIO(FILES[name]), "a", RANGE)).numpy()
    assert np.array_equal(levels, np.rint(COLOUR.transpose(2, 0, 1) * (255 / 4095)))
    if name.startswith("rgba"):
        assert np.array_equal(values(FILES[name], PixelFormat(4)), TWELVE.transpose(2, 0, 1))


def test_transparent_values_become_white_and_colour_grey() -> None:
    half = TWELVE.copy()
    half[..., 3] = 32768
    found = values(imagecodecs.png_encode(half)).astype(float)
    share = 32768 / 65535
    expected = COLOUR.transpose(2, 0, 1) * share + 65535 * (1 - share)
    assert np.abs(found - expected).max() <= 0.5
    grey = values(FILES["rgb.png"], PixelFormat(1))
    assert np.abs(grey[0] - COLOUR @ (0.299, 0.587, 0.114)).max() <= 0.5
    two = np.ascontiguousarray(TWELVE[..., [0, 3]])
    content = imagecodecs.png_encode(two)
    assert np.array_equal(values(content, PixelFormat(2)), two.transpose(2, 0, 1))
    assert np.array_equal(values(content, PixelFormat(1)), two.transpose(2, 0, 1)[:1])


@pytest.mark.parametrize("bits", [10, 12])
def test_fewer_bits_are_scaled_by_their_number(bits: int) -> None:
    """White is 255, and values stay as they are stored, in colour and in grey."""
    small = COLOUR >> (12 - bits)
    small[0, 0] = 2**bits - 1
    expected = small.transpose(2, 0, 1)
    assert np.array_equal(values(jpeg2000(small, bits)), expected)
    grey = jpeg2000(np.ascontiguousarray(small[..., 0]), bits)
    assert np.array_equal(values(grey), expected[:1])
    for content in (jpeg2000(small, bits), grey):
        for pixels in (RGB, PixelFormat(3, nodata=-1)):  # by Pillow, and by values
            found = as_pixels(read_image(io.BytesIO(content), "a", pixels)).numpy()
            shares = (expected if content is not grey else expected[[0, 0, 0]]) / (2**bits - 1)
            assert np.abs(found - 255 * shares).max() <= 1
            assert found[:, 0, 0].tolist() == [255] * 3
    content = imagecodecs.avif_encode(small >> (bits - 10), level=100, bitspersample=10)
    with open_image(io.BytesIO(content)) as image:
        assert image.stored == Stored(3, 10, False)
        assert image.values().dtype == np.uint16
        assert 900 < image.values().max() < 1024


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_2000_with_a_sign_keeps_it(bits: int, channels: int) -> None:
    """Pillow shifts values with a sign up."""
    kind = np.int8 if bits == 8 else np.int16
    small = ((TWELVE[..., :channels] >> 4 if bits == 8 else TWELVE[..., :channels]) - 0).astype(int)
    stored = (small - (100 if bits == 8 else 2048)).astype(kind).squeeze()
    content = imagecodecs.jpeg2k_encode(np.ascontiguousarray(stored), level=0, bitspersample=bits)
    expected = np.moveaxis(np.atleast_3d(stored), 2, 0)
    with open_image(io.BytesIO(content), "a", PixelFormat(channels)) as image:
        assert np.array_equal(image.values(), expected)
        assert image.stored == Stored(channels, bits, False)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("bits", [8, 16])
def test_jpeg_2000_that_is_cut_off_is_damaged(part: float, bits: int) -> None:
    """OpenJPEG gives what there is of it."""
    noise = np.random.default_rng(0).integers(0, 2**bits, (70, 90)).astype(f"u{bits // 8}")
    content = jpeg2000(noise, bits)
    with pytest.raises(ImageError) as caught:
        values(content[: int(part * len(content))])
    assert caught.value.defect == "damaged"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_value_becomes_white(channels: int) -> None:
    """Which the chunk tRNS names, in 16 bits as in 8."""
    deep = COLOUR[..., :channels] + np.uint16(1)
    content = imagecodecs.png_encode(np.ascontiguousarray(deep.squeeze()))
    named = b"tRNS" + deep[3, 4].astype(">u2").tobytes()
    chunk = struct.pack(">I", len(named) - 4) + named + struct.pack(">I", zlib.crc32(named))
    place = content.index(b"IDAT") - 4
    content = content[:place] + chunk + content[place:]
    for wanted in (1, 3):
        found = values(content, PixelFormat(wanted))
        assert found[:, 3, 4].tolist() == [65535] * len(found)
        assert (found[:, 0, 0] < 5000).all()
        with open_image(io.BytesIO(content), "a", PixelFormat(wanted)) as image:
            assert as_pixels(image.decode())[:, 3, 4].tolist() == [255] * wanted


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    """As Pillow turns the same picture of 8 bits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = (COLOUR // 16).astype(np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG", exif=exif)
    eight = as_pixels(read_image(stream)).numpy()
    chunks = stream.getvalue()
    start = chunks.index(b"eXIf") - 4
    chunk = chunks[start : chunks.index(b"IDAT") - 4]
    deep = imagecodecs.png_encode(pixels.astype(np.uint16) * 257)
    place = deep.index(b"IDAT") - 4
    with open_image(io.BytesIO(deep[:place] + chunk + deep[place:])) as image:
        assert image.size == eight.shape[1:]
        assert np.array_equal(image.values(), eight.astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("content", "bits"),
    [
        (b"P6\n10 12\n65535\n" + COLOUR.astype(">u2").tobytes(), 16),
        (b"P6\n10 12\n4095\n" + COLOUR.astype(">u2").tobytes(), 12),
        (sgi(COLOUR), 16),
    ],
)
def test_formats_without_another_decoder_are_refused(content: bytes, bits: int) -> None:
    with pytest.raises(ImageError, match=f"its values have {bits} bits, .* convert it") as caught:
        values(content)
    assert caught.value.defect == "misfit"
    assert as_pixels(read_image(io.BytesIO(content))).shape == (3, 12, 10)  # levels of 8 bits


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImageError, match=r"16 bits, of which Pillow reads 8: .*dino-ssl\[tiff\]"):
        values(FILES["rgb.png"])
    assert as_pixels(read_image(io.BytesIO(FILES["rgb.png"]))).max() == 15


@pytest.mark.usefixtures("unchecked")  # facts about images travel as arrays in a source
def test_check_says_the_bits_of_the_file_and_stats_measures_them(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "g.pgm").write_bytes(b"P5\n10 12\n4095\n" + COLOUR[..., 0].astype(">u2").tobytes())
    source = open_source(tmp_path)
    assert check(source, RGB).stored == {
        Stored(3, 16, False): 5,
        Stored(4, 16, False): 2,
        Stored(1, 12, False): 1,
    }
    (tmp_path / "g.pgm").unlink()
    stats, skipped = measure(open_source(tmp_path), RGB)
    assert skipped == []
    assert stats.high is not None
    assert all(3900 < high < 4096 for high in stats.high)
