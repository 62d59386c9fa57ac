"""Compressions of DICOM that pydicom itself does not decode, by imagecodecs (a plug-in)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

_CODECS = {  # by transfer syntax (PS3.5, annex A)
    "1.2.840.10008.1.2.4.51": "jpeg8_decode",  # JPEG of 12 bits
    "1.2.840.10008.1.2.4.57": "jpeg8_decode",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "jpeg8_decode",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "jpegls_decode",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "jpegls_decode",  # JPEG-LS with losses
}

DECODER_DEPENDENCIES = dict.fromkeys(_CODECS, ("imagecodecs",))
"""What pydicom names where the plug-in lacks it."""


def is_available(syntax: str) -> bool:
    """Whether imagecodecs is installed."""
    return find_spec("imagecodecs") is not None


@cache
def register() -> None:
    """Let pydicom find the plug-in."""
    from pydicom.pixels.decoders.base import get_decoder

    for syntax in _CODECS:
        get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))


def decode_frame(source: bytes, runner: Any) -> bytearray:
    """The values of one frame, colours by pixel."""
    import imagecodecs

    decoder = _CODECS[runner.transfer_syntax]
    # Colours are converted by pydicom, not here.
    as_stored = {"colorspace": "RGB", "outcolorspace": "RGB"}
    options = as_stored if decoder == "jpeg8_decode" and runner.samples_per_pixel > 1 else {}
    values = getattr(imagecodecs, decoder)(source, **options)
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return bytearray(values.tobytes())
