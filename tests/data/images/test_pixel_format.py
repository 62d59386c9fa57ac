"""Any number of channels, any type of values: what becomes of them, and what is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reading import levels, misfit
from PIL import Image

from dino.data.images.decode import as_picture, as_pixels, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS, PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.data.sources.open import open_source
from dino.files import UserError


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


# ---------------------------------------------------------------------------------- the format
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"channels": 0}, "channels is 0: it must be"),
        ({"page": -1}, "page is -1: it must be"),
        ({"low": (0.0,)}, "needs both low and high"),
        ({"high": (0.0,)}, "needs both low and high"),
        ({"low": (0.0, 1.0), "high": (2.0,)}, "2 bounds of pixel values do not fit 3 channels"),
        ({"low": (0.0,), "high": (1.0, 0.0, 2.0)}, "low must lie below high"),
    ],
)
def test_a_format_that_cannot_be_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PixelFormat(**settings)


@pytest.mark.usefixtures("unchecked")  # JSON has lists for tuples
def test_a_format_survives_json() -> None:
    form = PixelFormat(2, 1, (0.0, 1.0), (5.0, 6.0))
    stated = {"channels": 2, "page": 1, "low": [0.0, 1.0], "high": [5.0, 6.0]}
    assert Preprocessing.from_dict({"pixels": stated}).pixels == form
    with pytest.raises(UserError, match="the pixel format is damaged"):
        Preprocessing.from_dict({"pixels": {"gamma": 1}})


# ---------------------------------------------------------------------------------- endings
def test_endings_cover_all_that_pillow_decodes(tmp_path: Path) -> None:
    endings = {
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    identified = {".iim", ".mpg", ".mpeg", ".bufr", ".grib", ".h5", ".hdf", ".wmf", ".emf"}
    assert endings - set(EXTENSIONS) == identified | {".eps", ".ps", ".im"}
    picture, read = Image.new("RGB", (20, 16), (200, 30, 30)), []
    for ending in EXTENSIONS:
        with suppress(KeyError, OSError, ValueError):  # formats that Pillow only reads
            picture.save(tmp_path / f"a{ending.upper()}")
            read.append(ending)
    source = open_source(tmp_path)
    assert {Path(source.path(index)).suffix.lower() for index in range(len(source))} >= set(read)
    assert set(read) >= {".ppm", ".pgm", ".jfif", ".jp2", ".tga", ".pcx", ".sgi", ".dib"}
    for ending in read:
        assert levels(tmp_path / f"a{ending.upper()}").shape[0] == 3


# ---------------------------------------------------------------------------------- types
def test_the_range_of_integers_is_that_of_their_type(tmp_path: Path) -> None:
    byte = np.array([[0, 1, 254, 255]], np.uint8)
    assert levels(npy(tmp_path / "a.npy", byte), 1).tolist() == [[[0, 1, 254, 255]]]
    word = np.array([[0, 256, 257, 65535]], np.uint16)
    assert levels(npy(tmp_path / "b.npy", word), 1).tolist() == [[[0, 0, 1, 255]]]
    signed = np.array([[-(2**15), 0, 2**15 - 1]], np.int16)
    assert levels(npy(tmp_path / "c.npy", signed), 1).tolist() == [[[0, 127, 255]]]
    truth = np.array([[False, True]])
    assert levels(npy(tmp_path / "d.npy", truth), 1).tolist() == [[[0, 255]]]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32, np.uint64])
def test_other_numbers_fill_their_own_range(kind: type, tmp_path: Path) -> None:
    values = np.array([[10, 12, 20]], kind)
    assert levels(npy(tmp_path / "a.npy", values), 1).tolist() == [[[0, 51, 255]]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32, np.float64, ">u2"])
def test_a_range_holds_for_every_type(kind: Any, tmp_path: Path) -> None:
    values = np.array([[0, 10, 62, 110, 120]], kind)
    found = levels(npy(tmp_path / "a.npy", values), 1, low=(10.0,), high=(110.0,))
    assert found.tolist() == [[[0, 0, 133, 255, 255]]]


def test_what_is_not_finite_lies_outside_or_has_the_mean(tmp_path: Path) -> None:
    values = np.array([[np.nan, -np.inf, np.inf, 4.0]], np.float32)
    path = npy(tmp_path / "a.npy", values)
    assert levels(path, 1, low=(0.0,), high=(10.0,)).tolist() == [[[119, 0, 255, 102]]]
    assert levels(path, 1).max() == 0  # one finite value has no range
    assert levels(npy(tmp_path / "b.npy", np.full((2, 2), np.nan)), 1).max() == 0
    wide = np.array([[-1.7e308, 0.0, 1.7e308]])
    assert levels(npy(tmp_path / "c.npy", wide), 1).shape == (1, 1, 3)


def test_each_channel_may_have_its_own_range(tmp_path: Path) -> None:
    values = np.full((2, 3, 2), 40, np.uint16)
    found = levels(npy(tmp_path / "a.npy", values), 2, low=(0.0, 40.0), high=(100.0, 60.0))
    assert found[:, 0, 0].tolist() == [102, 0]


def test_a_range_makes_levels_of_rgb_too(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (0, 64, 128)).save(tmp_path / "a.png")
    found = levels(tmp_path / "a.png", 3, low=(0.0,), high=(128.0,))
    assert found[:, 0, 0].tolist() == [0, 128, 255]


# ---------------------------------------------------------------------------------- channels
FIVE = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7) * 257  # values 0 to 209 after that


def test_npy_with_channels_first_or_last(tmp_path: Path) -> None:
    for name, values in (("a.npy", FIVE), ("b.npy", FIVE.transpose(1, 2, 0))):
        assert np.array_equal(levels(npy(tmp_path / name, values), 5), FIVE // 257)
    fortran = np.asfortranarray(FIVE)
    assert np.array_equal(levels(npy(tmp_path / "c.npy", fortran), 5), FIVE // 257)
    assert "it has 5 channels, not 4: say --channels 5" in misfit(tmp_path / "a.npy", 4)
    assert "it has 5 channels, not 3: say --channels 5" in misfit(tmp_path / "b.npy", 3)


def test_npy_of_other_things_is_refused(tmp_path: Path) -> None:
    for name, values, words in (
        ("a.npy", np.zeros(4, np.uint8), r"an array of shape (4,) is no image"),
        ("b.npy", np.zeros((2, 2, 3, 4), np.uint8), "is no image"),
        ("c.npy", np.zeros((0, 4), np.uint8), "is no image"),
        ("d.npy", np.zeros((4, 4), np.complex64), "an array of complex64 is no image"),
        ("e.npy", np.array([["a", "b"]]), "is no image"),
    ):
        assert words in misfit(npy(tmp_path / name, values), 1)
    np.save(tmp_path / "f.npy", np.array([[None]]), allow_pickle=True)
    assert "an array of object is no image" in misfit(tmp_path / "f.npy", 1)


def test_pictures_in_their_own_channels(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 2), (9, 8, 7, 6)).save(tmp_path / "a.png")
    assert levels(tmp_path / "a.png", 4)[:, 0, 0].tolist() == [9, 8, 7, 6]
    Image.new("LA", (3, 2), (9, 6)).save(tmp_path / "b.png")
    assert levels(tmp_path / "b.png", 2)[:, 0, 0].tolist() == [9, 6]
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "c.png", transparency=0)
    assert levels(tmp_path / "c.png", 4)[:, 0, 0].tolist() == [9, 8, 7, 255]
    Image.new("CMYK", (8, 8), (1, 2, 3, 4)).save(tmp_path / "d.tif")
    assert levels(tmp_path / "d.tif", 4).shape == (4, 8, 8)
    Image.new("RGB", (3, 2)).save(tmp_path / "e.png")
    assert "it has 3 channels, not 4: say --channels 3" in misfit(tmp_path / "e.png", 4)


def test_colour_becomes_grey(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "a.png")
    assert levels(tmp_path / "a.png", 1)[:, 0, 0].tolist() == [76]
    word = np.full((2, 3), 257 * 9, np.uint16)
    Image.fromarray(word).save(tmp_path / "b.png")
    assert levels(tmp_path / "b.png", 1)[:, 0, 0].tolist() == [9]
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "c.png")
    assert levels(tmp_path / "c.png", 1)[:, 0, 0].tolist() == [255]  # transparent is white


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="it is a program in PostScript") as caught:
        read_image(tmp_path / "a.jpg")
    assert caught.value.defect == "not an image"


def test_a_picture_of_any_channels() -> None:
    import torch

    image = torch.tensor([10, 20, 60, 70, 90], dtype=torch.uint8)[:, None, None].expand(5, 2, 3)
    assert as_picture(image).getpixel((0, 0)) == (50, 50, 50)


# ---------------------------------------------------------------------------------- no data
def test_pixels_without_data_get_the_mean_and_stretch_nothing(tmp_path: Path) -> None:
    values = np.array([[10.0, 12.0, 20.0, -9999.0]], np.float32)
    path = npy(tmp_path / "a.npy", values)
    assert levels(path, 1, nodata=-9999.0).tolist() == [[[0, 51, 255, 102]]]
    bounds = {"low": (10.0,), "high": (30.0,), "nodata": -9999.0}
    assert levels(path, 1, **bounds).tolist() == [[[0, 26, 128, 51]]]
    byte = npy(tmp_path / "b.npy", np.array([[0, 100, 200]], np.uint8))
    assert levels(byte, 1, nodata=0.0).tolist() == [[[150, 100, 200]]]
    assert levels(byte, 1, nodata=-9999.0).tolist() == [[[0, 100, 200]]]  # none has it
    empty = npy(tmp_path / "c.npy", np.full((1, 2), 7, np.uint16))
    assert levels(empty, 1, nodata=7.0).tolist() == [[[0, 0]]]


def test_each_channel_has_its_own_pixels_without_data(tmp_path: Path) -> None:
    values = np.array([[[0, 5, 5]], [[4, 0, 4]]], np.uint8)
    path = npy(tmp_path / "a.npy", values)
    assert levels(path, 2, nodata=0.0).tolist() == [[[5, 5, 5]], [[4, 4, 4]]]
    Image.new("RGB", (3, 2), (0, 64, 128)).save(tmp_path / "a.png")
    assert levels(tmp_path / "a.png", 3, nodata=64.0)[:, 0, 0].tolist() == [0, 0, 128]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u2", "i2", "f4", "f8", "i4"])
def test_npy_of_any_byte_order_alone_and_as_data(kind: str, order: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (4, 6, 7)).astype(order + kind)
    found = open_source(npy(tmp_path / "a.npy", values))
    for index, image in enumerate(values):
        expected = levels(npy(tmp_path / "b.npy", image))
        assert np.array_equal(as_pixels(found[index]).numpy(), expected)
        with found.open(index) as opened:
            assert np.array_equal(opened.values()[0], image)


def test_npy_of_truth_values_as_data(tmp_path: Path) -> None:
    found = open_source(npy(tmp_path / "a.npy", np.eye(6, dtype=bool)[None]))
    assert np.array_equal(as_pixels(found[0]).numpy()[0], np.eye(6) * 255)
