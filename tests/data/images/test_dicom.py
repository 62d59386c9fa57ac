"""DICOM images: values in their units, levels as their tags say, and files that hold none."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from helpers.dicoms import dicom
from helpers.reading import levels, misfit, stored_values
from hypothesis import given
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_windowing

from dino.data.commands.stats import measure
from dino.data.images.bit_depth import Stored
from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source

RNG = np.random.default_rng(0)


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


def stream(values: np.ndarray, **fields: Any) -> io.BytesIO:
    dicom(file := io.BytesIO(), values, **fields)
    return file


# ---------------------------------------------------------------------------------- the grid
@given(
    kind=st.sampled_from(["u1", "i1", "u2", "i2"]),
    slope=st.sampled_from([None, "", 1, 2.5, [0.5, 7]]),
    intercept=st.sampled_from([None, "", 0, -1024, [-10, 7]]),
    centre=st.sampled_from([None, "", 40, [20.5, 300]]),
    width=st.sampled_from([None, "", 1, 400, [100, 2000]]),
    function=st.sampled_from([None, "LINEAR", "LINEAR_EXACT"]),
    inverted=st.booleans(),
)
def test_values_and_levels_are_those_of_pydicom(
    kind: str, slope: Any, intercept: Any, centre: Any, width: Any, function: Any, inverted: bool
) -> None:
    values = np.arange(-120, 120).reshape(12, 20).astype(kind)
    tags = {
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
        "WindowCenter": centre,
        "WindowWidth": width,
        "VOILUTFunction": function,
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
    }
    given_tags = {name: value for name, value in tags.items() if value is not None}
    file = stream(values, **given_tags)
    first = {name: np.atleast_1d(value)[0] for name, value in tags.items()}
    plain = Dataset()  # without empty tags, which pydicom does not take
    plain.RescaleSlope = float(first["RescaleSlope"] or 1)
    plain.RescaleIntercept = float(first["RescaleIntercept"] or 0)
    expected = apply_modality_lut(values, plain)
    assert np.array_equal(stored_values(file, PixelFormat(1))[0], expected.astype(np.float32))
    shares = (expected - expected.min()) / np.ptp(expected)
    if first["WindowCenter"] and first["WindowWidth"]:
        plain.WindowCenter, plain.WindowWidth = map(
            float, (first["WindowCenter"], first["WindowWidth"])
        )
        plain.VOILUTFunction = function or "LINEAR"
        plain.PhotometricInterpretation, plain.BitsStored = "MONOCHROME2", 8
        plain.PixelRepresentation = 0
        # Between its output of 8 bits and 255 levels lies one scale, which rescaling moves.
        made = apply_windowing(expected, plain)
        shares = (made - made.min()) / max(np.ptp(made), 1e-9) if np.ptp(made) else None
        if shares is not None and (made.min(), made.max()) != extremes(plain):
            shares = None
    if shares is not None:
        levels_expected = 255 * (1 - shares if inverted else shares)
        assert np.abs(levels(file, 1)[0] - levels_expected).max() <= 1
    bounds = np.clip((expected + 50) / 100, 0, 1)
    found = levels(file, 1, low=(-50.0,), high=(50.0,))[0]
    assert np.abs(found - 255 * (1 - bounds if inverted else bounds)).max() <= 1


def extremes(data: Dataset) -> tuple[float, float]:
    """Output of the windowing of 8 bits without sign for what lies outside the window."""
    ends = np.array([-1e9, 1e9])
    low, high = apply_windowing(ends, data)
    return float(low), float(high)


# ---------------------------------------------------------------------------------- tags
@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_padding_holds_no_data(kind: str, tmp_path: Path) -> None:
    """It is left out of the stretch, and of ranges and means."""
    values = np.array([[60000, 0, 100, 400]], np.uint16).view(kind)
    padding = int(values[0, 0])
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1024}
    path = scan(tmp_path / "a.dcm", values, PixelPaddingValue=padding, **rescale)
    assert stored_values(path, PixelFormat(1))[0, 0, 1:].tolist() == [-1024, -824, -224]
    assert levels(path, 1).tolist() == [[[106, 0, 64, 255]]]
    values = np.array([[60000, 60009, 100, 400]], np.uint16).view(kind)
    limit = {"PixelPaddingValue": padding, "PixelPaddingRangeLimit": int(values[0, 1])}
    path = scan(tmp_path / "b.dcm", values, **limit)
    assert levels(path, 1).tolist() == [[[128, 128, 0, 255]]]
    path = scan(tmp_path / "c.dcm", values[:, 2:], **limit)  # there is none
    assert levels(path, 1).tolist() == [[[0, 255]]]


@pytest.mark.usefixtures("unchecked")  # pixels travel as arrays in a source
def test_dark_on_bright_keeps_its_values_and_range(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    assert stored_values(path, PixelFormat(1)).tolist() == [RAMP.tolist()]
    assert levels(path, 1, low=(0.0,), high=(4000.0,)).tolist() == [[[255, 191, 128, 0]]]
    stats, _ = measure(open_source(tmp_path), PixelFormat(1))
    assert stats.low is not None
    assert stats.low[0] >= 0
    assert stats.mean[0] == pytest.approx(1 - 1750 / 4000, abs=0.02)


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    indices = RNG.integers(0, 255, (6, 7), dtype=np.uint8)
    table = RNG.integers(0, 65535, (3, 256), dtype=np.uint16)
    names = ("Red", "Green", "Blue")
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, colours in zip(names, table, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = colours.tobytes()
    path = scan(tmp_path / "a.dcm", indices, **tags)
    assert np.array_equal(stored_values(path), table[:, indices])
    data = pydicom.dcmread(path)
    assert np.array_equal(
        stored_values(path), np.moveaxis(apply_color_lut(data.pixel_array, data), 2, 0)
    )


def test_rescale_and_window_in_functional_groups() -> None:
    """Those of the frame come before the shared ones."""
    shared, frames = Dataset(), [Dataset() for _ in range(2)]
    rescale, window = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -1000
    shared.PixelValueTransformationSequence = [rescale]
    window.WindowCenter, window.WindowWidth = 0.5, 2001
    frames[1].FrameVOILUTSequence = [window]
    file = stream(
        np.stack([RAMP, RAMP + 100]).astype(np.uint16),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    expected = (RAMP + 100.0) * 2 - 1000
    assert np.array_equal(stored_values(file, PixelFormat(1, 1))[0], expected)
    assert levels(file, 1, 1).tolist() == [[[26, 255, 255, 255]]]
    assert levels(file, 1, 0).tolist() == [[[0, 64, 128, 255]]]  # no window: stretched


def test_the_bits_are_those_of_the_file() -> None:
    with open_image(stream(RAMP, BitsStored=12, HighBit=11), pixels=PixelFormat(1)) as image:
        assert image.stored == Stored(1, 12, False)


# ---------------------------------------------------------------------------------- files
def test_the_preamble_may_be_that_of_a_tiff_or_missing() -> None:
    content = stream(RAMP).getvalue()
    expected = levels(io.BytesIO(content), 1)
    preamble = io.BytesIO(b"II*\0\x08\0\0\0".ljust(128, b"\0") + content[128:])
    assert np.array_equal(levels(preamble, 1), expected)
    assert np.array_equal(levels(io.BytesIO(content[132:]), 1), expected)  # begins with its meta
    for implicit in (True, False):
        data = pydicom.dcmread(io.BytesIO(content))
        syntax = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        data.SOPClassUID = uid.CTImageStorage
        bare = io.BytesIO()
        del data.file_meta
        pydicom.dcmwrite(bare, data, implicit_vr=implicit, little_endian=syntax.is_little_endian)
        assert np.array_equal(levels(bare, 1), expected)


def test_files_without_pixels_are_no_images(tmp_path: Path) -> None:
    content = stream(RAMP)
    content.seek(0)
    data = pydicom.dcmread(content)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(data, name)
    data.Modality = "SR"
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(ImageError, match=r"a DICOM file without pixels \(SR\)") as caught:
        levels(tmp_path / "a.dcm", 1)
    assert caught.value.defect == "not an image"


def test_several_frames_are_said_to_be_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    file = stream(np.stack([RAMP] * 5))
    for wanted in (1, 3):
        assert "it is a stack of 5 frames: choose one by --page" in misfit(file, wanted)
    monkeypatch.setattr(
        pydicom.dataset.Dataset, "pixel_array", property(lambda _: pytest.fail("all are decoded"))
    )
    assert levels(file, 1, 4).shape == (1, 1, 4)


# ---------------------------------------------------------------------------------- compression
GREY = RNG.integers(0, 4095, (24, 20), dtype=np.uint16)
COLOUR = RNG.integers(0, 255, (24, 20, 3), dtype=np.uint8)


def lossless_jpeg(values: np.ndarray) -> bytes:
    bits = 12 if values.dtype == np.uint16 else 8
    colours = {"colorspace": "RGB", "outcolorspace": "RGB"} if values.ndim == 3 else {}
    encoded: bytes = imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=bits, **colours)
    return encoded


CODECS: dict[str, tuple[Callable[[np.ndarray], bytes], int]] = {
    uid.JPEGLosslessSV1: (lossless_jpeg, 0),
    uid.JPEGLossless: (lossless_jpeg, 0),
    uid.JPEGExtended12Bit: (lambda v: imagecodecs.jpeg8_encode(v, level=100, bitspersample=12), 40),
    uid.JPEGLSLossless: (imagecodecs.jpegls_encode, 0),
    uid.JPEGLSNearLossless: (lambda v: imagecodecs.jpegls_encode(v, level=2), 2),
    uid.HTJ2KLossless: (imagecodecs.htj2k_encode, 0),
    uid.JPEG2000Lossless: (lambda v: imagecodecs.jpeg2k_encode(v, level=0, codecformat="j2k"), 0),
}


@pytest.mark.parametrize("syntax", CODECS)
@pytest.mark.parametrize("frames", [1, 2])
def test_compressed_frames_have_their_values(syntax: str, frames: int) -> None:
    encode, error = CODECS[syntax]
    file = compressed(GREY, encode, syntax, frames)
    found = stored_values(file, PixelFormat(1, frames - 1))[0]
    assert np.abs(found - GREY.astype(float)).max() <= error


@pytest.mark.parametrize("syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_compressed_colours_have_their_values(syntax: str) -> None:
    file = compressed(COLOUR, CODECS[syntax][0], syntax)
    assert np.array_equal(levels(file), np.moveaxis(COLOUR, 2, 0))


@pytest.mark.parametrize("syntax", CODECS)
def test_a_frame_that_is_cut_off_is_damaged(syntax: str) -> None:
    """libjpeg and OpenJPEG would give what they have read of it, and grey or zeros for the rest."""
    encode, _ = CODECS[syntax]
    for part in (0.3, 0.5, 0.7, 0.9):
        short = compressed(GREY, lambda v, p=part: cut(encode(v), p), syntax)
        with pytest.raises(ImageError) as caught:
            levels(short, 1)
        assert caught.value.defect == "damaged"


def cut(content: bytes, part: float) -> bytes:
    return bytes(content[: int(part * len(content)) // 2 * 2])


@pytest.mark.parametrize("kind", ["u1", "u2", "i2"])
def test_values_that_are_cut_off_are_damaged(kind: str) -> None:
    content = stream(RNG.integers(0, 99, (32, 30)).astype(kind)).getvalue()
    whole = levels(io.BytesIO(content), 1)
    for missing in (1, 2, 50, 500):
        with pytest.raises(ImageError, match="ends in the middle of its pixels") as caught:
            levels(io.BytesIO(content[:-missing]), 1)
        assert caught.value.defect == "damaged"
    assert np.array_equal(levels(io.BytesIO(content + bytes(2)), 1), whole)  # padding behind it


def test_signed_jpeg_2000_keeps_its_sign() -> None:
    values = (GREY.astype(int) - 2000).astype(np.int16)
    encode = CODECS[uid.JPEG2000Lossless][0]
    file = compressed(values, encode, uid.JPEG2000Lossless)
    assert np.array_equal(stored_values(file, PixelFormat(1))[0], values)


def test_a_compression_without_a_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    video = compressed(GREY, lambda _: b"no video", uid.MPEG2MPML)
    found = misfit(video, 1)
    assert "it is compressed as MPEG2 Main Profile / Main Level: decompress it" in found
    file = compressed(GREY, lossless_jpeg, uid.JPEGLosslessSV1)
    decoder = pydicom.pixels.get_decoder(uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=r"compressed as JPEG Lossless.*: pip install 'dino-ssl"):
        levels(file, 1)


def compressed(
    values: np.ndarray, encode: Callable[[np.ndarray], bytes], syntax: str, frames: int = 1
) -> io.BytesIO:
    file = stream(values if frames == 1 else np.stack([values] * frames))
    file.seek(0)
    data = pydicom.dcmread(file)
    if values.ndim == 2:
        data.BitsStored, data.HighBit = 12, 11
    noise = [values] * frames
    data.PixelData = encapsulate([encode(frame) for frame in noise])
    data.file_meta.TransferSyntaxUID = syntax
    data["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(written := io.BytesIO(), data, enforce_file_format=True)
    return written


# ---------------------------------------------------------------------------------- the extra
def test_what_an_extra_reads_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    image = stream(RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match=r"is a DICOM image: pip install 'dino-ssl\[dicom\]"):
        levels(image, 1)
