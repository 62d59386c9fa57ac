"""Any number of channels, any type of values: what becomes of them, and what is refused."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from helpers.dicoms import dicom
from PIL import Image

from dino.data.images.decode import as_picture, as_pixels, open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS, RGB, PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.data.sources.open import open_source
from dino.files import UserError


def levels(path: Path, *channels: Any, **options: Any) -> np.ndarray:
    """The file's levels [C, H, W]."""
    return as_pixels(read_image(path, pixels=PixelFormat(*channels, **options))).numpy()


def stored_values(path: Path, pixels: PixelFormat = RGB) -> np.ndarray:
    """The file's values as they are stored."""
    with open_image(path, pixels=pixels) as image:
        return image.values()


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def tiff(path: Path, values: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, values, **{"photometric": "minisblack", **options})
    return path


def misfit(path: Path, *channels: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        levels(path, *channels, **options)
    assert caught.value.defect == "misfit"
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_what_is_not_finite_lies_outside_or_is_black(tmp_path: Path) -> None:
    values = np.array([[np.nan, -np.inf, np.inf, 4.0]], np.float32)
    path = npy(tmp_path / "a.npy", values)
    assert levels(path, 1, low=(0.0,), high=(10.0,)).tolist() == [[[0, 0, 255, 102]]]
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


@pytest.mark.parametrize("planar", ["separate", "contig"])
@pytest.mark.parametrize("channels", [2, 5, 9])
def test_tiff_samples_are_channels(planar: str, channels: int, tmp_path: Path) -> None:
    values = np.arange(channels * 16 * 17, dtype=np.uint16).reshape(channels, 16, 17) * 23
    stored = values if planar == "separate" else values.transpose(1, 2, 0)
    for name, options in (("a.tif", {}), ("b.tif", {"tile": (16, 16), "compression": "zlib"})):
        path = tiff(tmp_path / name, stored, planarconfig=planar, **options)
        assert np.array_equal(levels(path, channels), values // 257)
        assert np.array_equal(stored_values(path, PixelFormat(channels)), values)
        for wanted in (1, 3):
            assert f"it has {channels} channels, not {wanted}" in misfit(path, wanted)


@pytest.mark.parametrize("planar", ["separate", "contig"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_rgb_tiffs_of_eight_and_sixteen_bits(
    planar: str, compression: str | None, tmp_path: Path
) -> None:
    for kind, unit in ((np.uint8, 1), (np.uint16, 257)):
        values = (np.arange(3 * 16 * 17).reshape(3, 16, 17) % 256 * unit).astype(kind)
        stored = values if planar == "separate" else values.transpose(1, 2, 0)
        options = {"photometric": "rgb", "planarconfig": planar, "compression": compression}
        path = tiff(tmp_path / "a.tif", stored, **options)
        assert np.array_equal(levels(path), values // unit)


def test_tiff_pages_are_channels_or_chosen(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    tifffile.imwrite(path, FIVE, photometric="minisblack", metadata={"axes": "CYX"})
    assert np.array_equal(levels(path, 5), FIVE // 257)
    assert np.array_equal(levels(path, 1), FIVE[:1] // 257)
    assert np.array_equal(levels(path, 1, 3), FIVE[3:4] // 257)
    grey = levels(path, 3, 3)
    assert np.array_equal(grey, np.broadcast_to(FIVE[3] // 257, (3, 6, 7)))
    assert "it has no page 7" in misfit(path, 1, 7)
    assert "it has 5 pages, no 7" in misfit(path, 5, 7)
    assert "it has 1 channel, not 2" in misfit(path, 2)


def test_tiff_of_floats_in_channels(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 4 * 6 * 7, dtype=np.float32).reshape(4, 6, 7)
    path = tiff(tmp_path / "a.tif", values, planarconfig="separate")
    assert levels(path, 4).min() == 0
    assert levels(path, 4).max() == 255
    assert levels(path, 4, low=(-1.0,), high=(3.0,)).max() == 128


def test_complex_tiffs_are_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", np.ones((6, 7), np.complex64))
    for channels in (1, 3, 5):
        assert "complex64 is no image" in misfit(path, channels)


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


# ---------------------------------------------------------------------------------- DICOM
def scan(path: Path, values: np.ndarray, **fields: Any) -> Path:
    dicom(path, values, **fields)
    return path


RAMP = np.array([[0, 1000, 2000, 4000]], np.uint16)


def test_dicom_in_its_own_units(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1000)
    values = stored_values(path, PixelFormat(1))
    assert values.tolist() == [[[-1000, 1000, 3000, 7000]]]
    assert levels(path, 1).tolist() == [[[0, 64, 128, 255]]]
    assert levels(path, 1, low=(-1000.0,), high=(1000.0,)).tolist() == [[[0, 255, 255, 255]]]
    assert levels(path).shape == (3, 1, 4)


def test_dark_on_bright_is_turned_over(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    assert levels(path, 1).tolist() == [[[255, 191, 128, 0]]]


def test_a_window_is_used_unless_there_is_a_range(tmp_path: Path) -> None:
    window = {"WindowCenter": [1500, 9], "WindowWidth": [1000, 9]}
    path = scan(tmp_path / "a.dcm", RAMP, **window)
    assert levels(path, 1).tolist() == [[[0, 0, 255, 255]]]
    assert levels(path, 1, low=(0.0,), high=(4000.0,)).tolist() == [[[0, 64, 128, 255]]]
    turned = scan(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **window)
    assert levels(turned, 1).tolist() == [[[255, 255, 0, 0]]]


def test_dicom_frames_and_colours(tmp_path: Path) -> None:
    frames = scan(tmp_path / "a.dcm", np.stack([RAMP, RAMP[:, ::-1]]))
    assert levels(frames, 1, 1).tolist() == [[[255, 128, 64, 0]]]
    assert "it has 2 frames, no 2" in misfit(frames, 1, 2)
    colour = np.zeros((4, 5, 3), np.uint8)
    colour[..., 1] = 9
    path = scan(tmp_path / "b.dcm", colour)
    assert levels(path)[:, 0, 0].tolist() == [0, 9, 0]
    assert "it has 3 channels, not 1" in misfit(path, 1)


# ---------------------------------------------------------------------------------- extras
def test_what_an_extra_reads_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = scan(tmp_path / "a.dcm", RAMP)
    bands = tiff(tmp_path / "a.tif", FIVE, planarconfig="separate")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"a\.dcm is a DICOM image: pip install 'dino-ssl\[dicom\]"):
        levels(image, 1)
    with pytest.raises(UserError, match=r"a\.tif is a TIFF .* pip install 'dino-ssl\[tiff\]"):
        levels(bands, 5)
