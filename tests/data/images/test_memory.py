"""Small files of large images: refused by their size in memory, or converted piece by piece."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from helpers.dicoms import dicom
from helpers.reading import levels
from PIL import Image

from dino.data.images import decode, pixel_format
from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat, by_rows

RNG = np.random.default_rng(0)
SIDE = 40
"""Of images here; the limit is put between 8 bytes for each pixel and more."""


def picture(kind: str, mode: str) -> io.BytesIO:
    Image.new(mode, (SIDE, SIDE)).save(stream := io.BytesIO(), kind)
    return stream


def tiff(kind: str, **options: Any) -> io.BytesIO:
    shape = (SIDE, SIDE, 3) if options.get("photometric") == "rgb" else (SIDE, SIDE)
    tifffile.imwrite(stream := io.BytesIO(), np.zeros(shape, kind), **options)
    return stream


def npy(kind: str) -> io.BytesIO:
    np.save(stream := io.BytesIO(), np.zeros((SIDE, SIDE), kind))
    return stream


def scan(shape: tuple[int, ...]) -> io.BytesIO:
    dicom(stream := io.BytesIO(), np.zeros(shape, np.uint16 if len(shape) == 2 else np.uint8))
    return stream


LIMIT = 4 * SIDE * SIDE
LARGE: dict[str, tuple[Callable[[], io.BytesIO], float]] = {
    "png": (lambda: picture("PNG", "RGB"), 3),
    "png with transparency": (lambda: picture("PNG", "RGBA"), 4),
    "png of a palette": (lambda: picture("PNG", "P"), 3),
    "jpeg": (lambda: picture("JPEG", "RGB"), 3),
    "webp": (lambda: picture("WEBP", "RGB"), 3),
    "tiff by pillow": (lambda: tiff("u1", photometric="rgb"), 3),
    "tiff of floats": (lambda: tiff("f8", photometric="minisblack", compression="zlib"), 8),
    "tiff of 16 bits": (lambda: tiff("u2", photometric="rgb", compression="zlib"), 6),
    "npy": (lambda: npy("f8"), 8),
    "dicom": (lambda: scan((SIDE, SIDE)), 4),
    "dicom in colour": (lambda: scan((SIDE, SIDE, 3)), 3),
}
"""Files, and bytes of each pixel in memory."""


@pytest.mark.parametrize("name", LARGE)
def test_an_image_above_the_limit_is_refused_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = LARGE[name]
    content = make()
    pixels = int(size * SIDE * SIDE)
    monkeypatch.setattr(pixel_format, "MOST_BYTES", pixels)
    levels(content)
    monkeypatch.setattr(pixel_format, "MOST_BYTES", pixels - 1)
    with pytest.raises(
        ImageError, match=r"decoded it takes .* MiB, more than .*: cut it"
    ) as caught:
        levels(content)
    assert caught.value.defect == "too large"


def test_a_png_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_format, "MOST_BYTES", 100)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="decoded it takes"):
        levels(picture("PNG", "RGB"))


def test_the_pixels_that_pillow_refuses_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    content = picture("PNG", "RGB")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 2 - 1)
    with pytest.raises(ImageError, match=r"it has 1,600, more than 1,598 pixels: cut it") as caught:
        levels(content)
    assert caught.value.defect == "too large"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "F"])
def test_a_large_picture_is_converted_piece_by_piece(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = RNG.integers(0, 255, (30, 20, 4), dtype=np.uint8)
    if mode in ("I;16", "F"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(noise).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    kind = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    image.save(stream := io.BytesIO(), kind, **({"transparency": 3} if mode == "P" else {}))
    expected = levels(stream)
    monkeypatch.setattr(decode, "LARGE", 100)
    monkeypatch.setattr(pixel_format, "_BLOCK", 100)
    with open_image(stream, pixels=PixelFormat(3)) as opened:
        assert np.array_equal(decode.as_pixels(opened.decode()).numpy(), expected)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "f4", "i8"])
def test_levels_made_piece_by_piece_are_those_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.integers(-99, 99, (5, 31, 17)).astype(kind)
    formats = (PixelFormat(5), PixelFormat(5, low=(0.0,), high=(50.0,)), PixelFormat(5, nodata=3))
    expected = [form.levels(values) for form in formats]
    monkeypatch.setattr(pixel_format, "_BLOCK", 200)
    for form, whole in zip(formats, expected, strict=True):
        assert np.array_equal(form.levels(values), whole)
    shapes: list[tuple[int, ...]] = []
    by_rows(lambda part: shapes.append(part.shape) or part, values)
    assert max(np.prod(shape) for shape in shapes) <= 200
