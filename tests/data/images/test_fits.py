"""FITS: values with their sign, zero and scale, as the standard defines them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.reading import levels, misfit, stored_values

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat

BITPIX = {"u1": 8, "i2": 16, "i4": 32, "i8": 64, "f4": -32, "f8": -64}


def fits(values: np.ndarray, before: bytes = b"", **cards: object) -> io.BytesIO:
    """A file with one image [..., H, W], its first row stored first."""
    kind = values.dtype.str[1:]
    sides = {f"NAXIS{number}": side for number, side in enumerate(values.shape[::-1], 1)}
    start = {"XTENSION": "'IMAGE   '"} if before else {"SIMPLE": "T"}
    all_cards = {**start, "BITPIX": BITPIX[kind], "NAXIS": values.ndim, **sides, **cards}
    lines = [f"{name:8}= {value!s:>20} / a comment".ljust(80) for name, value in all_cards.items()]
    header = "".join([*lines, "END".ljust(80)]).encode()
    parts = (header.ljust(-(-len(header) // 2880) * 2880), values.astype(f">{kind}").tobytes())
    return io.BytesIO(before + parts[0] + parts[1].ljust(-(-len(parts[1]) // 2880) * 2880, b"\0"))


@pytest.mark.parametrize("kind", BITPIX)
@pytest.mark.parametrize("shape", [(6, 7), (3, 6, 7), (1, 6, 7)])
def test_values_have_their_sign_and_the_first_row_lies_below(
    kind: str, shape: tuple[int, ...]
) -> None:
    values = (np.arange(np.prod(shape)).reshape(shape) - (0 if kind == "u1" else 60)).astype(kind)
    expected = values.reshape(-1, 6, 7)[:, ::-1]
    found = stored_values(fits(values), PixelFormat(len(expected)))
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_zero_and_scale_are_applied() -> None:
    stored = np.array([[-32768, -1, 0, 32767]], np.int16)
    unsigned = stored_values(fits(stored, BZERO=32768.0), PixelFormat(1))
    assert unsigned.dtype == np.uint16
    assert unsigned.tolist() == [[[0, 32767, 32768, 65535]]]
    scaled = stored_values(fits(stored, BZERO=100, BSCALE=0.5), PixelFormat(1))
    assert scaled.tolist() == [[[-16284.0, 99.5, 100.0, 16483.5]]]


def test_blank_pixels_hold_no_data() -> None:
    values = np.array([[0, 10, 20, -999]], np.int16)
    for cards, unit in (({"BLANK": -999}, 1.0), ({"BLANK": -999, "BSCALE": 0.1}, 0.1)):
        found = levels(fits(values, **cards), 1, low=(0.0,), high=(20 * unit,))
        assert found.tolist() == [[[0, 128, 255, 128]]]


def test_the_first_image_may_be_an_extension() -> None:
    values = np.arange(42, dtype=np.float32).reshape(6, 7)
    empty = b"".join(
        card.ljust(80).encode() for card in ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0", "END")
    ).ljust(2880)
    file = fits(values, before=empty, PCOUNT=0, GCOUNT=1)
    assert np.array_equal(stored_values(file, PixelFormat(1))[0], values[::-1])
    with pytest.raises(ImageError, match="it ends before an image"):
        levels(io.BytesIO(empty))


def test_what_cannot_be_read_is_refused() -> None:
    values = np.zeros((2, 3, 4, 5), np.float32)
    assert "a FITS image of shape (2, 3, 4, 5) is no image" in misfit(fits(values))
    with pytest.raises(ImageError) as caught:
        levels(io.BytesIO(fits(np.zeros((99, 99))).getvalue()[:-3000]))
    assert caught.value.defect == "damaged"
