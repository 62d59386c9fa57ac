"""Damaged metadata never cost pixels; damaged pixels are still damaged."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.reading import levels
from PIL import Image, ImageCms

from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.metadata import pixels_only

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def saved(kind: str, **options: object) -> bytes:
    Image.fromarray(NOISE).save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes, damaged: bool = False) -> bytes:
    check = zlib.crc32(name + data) ^ damaged
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def with_chunk(part: bytes, before: bytes) -> bytes:
    content = saved("PNG")
    place = content.index(before) - 4
    return content[:place] + part + content[place:]


LONG = zlib.compress(b"x" * (2**26 + 1))
CHUNKS = {
    "text that unpacks to 64 MiB": chunk(b"zTXt", b"a\0\0" + LONG),
    "text of a wrong checksum": chunk(b"tEXt", b"a\0b", damaged=True),
    "profile that is none": chunk(b"iCCP", b"a\0\0" + b"no zlib"),
    "EXIF that is none": chunk(b"eXIf", b"no EXIF"),
    "animation that is none": chunk(b"acTL", b"\0\0"),
    "frames that are not there": chunk(b"acTL", struct.pack(">II", 5, 0)),
    "resolution that is cut": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("name", CHUNKS)
def test_pngs_are_read_whatever_their_other_chunks(name: str, before: bytes) -> None:
    content = with_chunk(CHUNKS[name], before)
    assert np.array_equal(levels(io.BytesIO(content)), np.moveaxis(NOISE, 2, 0))


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


SEGMENTS = {
    "EXIF that is none": segment(0xE1, b"Exif\0\0no EXIF"),
    "EXIF that points nowhere": segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\0"),
    "profile that is none": segment(0xE2, b"ICC_PROFILE\0\1\1no profile"),
    "profile in parts that are not there": segment(0xE2, b"ICC_PROFILE\0\5\7part"),
    "pictures that are not there": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "settings of Photoshop that are cut": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0"),
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("factor", [1, 4])
def test_jpegs_are_read_whatever_their_other_segments(name: str, factor: int) -> None:
    content = saved("JPEG", quality=95)
    spoiled = content[:2] + SEGMENTS[name] + content[2:]

    def pixels(content: bytes) -> np.ndarray:
        with open_image(io.BytesIO(content)) as image:
            return np.asarray(image.decode(factor))

    assert np.array_equal(pixels(spoiled), pixels(content))


def test_a_jpeg_that_pillow_cannot_open_is_read_without_its_metadata() -> None:
    content = saved("JPEG", quality=95)
    cut = content[:2] + segment(0xEE, b"Adobe\0") + content[2:]
    assert np.array_equal(levels(io.BytesIO(cut)), levels(io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nothing_but_pixels_remains(kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274] = 6
    content = saved(kind, exif=exif, icc_profile=profile)
    plain = pixels_only(io.BytesIO(content))
    assert plain is not None
    with Image.open(plain) as picture, Image.open(io.BytesIO(content)) as full:
        assert not picture.getexif()
        assert "icc_profile" not in picture.info
        assert np.array_equal(np.asarray(picture), np.asarray(full))
    assert pixels_only(io.BytesIO(saved("BMP"))) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_that_are_cut_stay_damaged(kind: str) -> None:
    content = saved(kind)
    with pytest.raises(ImageError) as caught:
        levels(io.BytesIO(content[: len(content) // 2]))
    assert caught.value.defect == "damaged"


def test_an_mpo_is_decoded_at_reduced_size() -> None:
    big = Image.fromarray(NOISE).resize((400, 320))
    big.save(stream := io.BytesIO(), "MPO", save_all=True, append_images=[big])
    with open_image(stream) as image:
        assert image.size == (320, 400)
        assert image.decode(4).size == (100, 80)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_pixels_that_are_half_decoded_are_damaged(place: float) -> None:
    """Reading the EXIF of a PNG decodes it; a second time, Pillow would return what it had."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream := io.BytesIO(), "PNG")
    content = bytearray(stream.getvalue())
    at = int(place * len(content))
    content[at : at + 40] = bytes(40)
    with pytest.raises(ImageError) as caught:
        levels(io.BytesIO(content))
    assert caught.value.defect == "damaged"
