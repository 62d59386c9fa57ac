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
    "1.2.840.10008.1.2.4.90": "jpeg2k_decode",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "jpeg2k_decode",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "jpeg2k_decode",  # high-throughput JPEG 2000 lossless
    "1.2.840.10008.1.2.4.202": "jpeg2k_decode",  # the same, by resolution
    "1.2.840.10008.1.2.4.203": "jpeg2k_decode",  # high-throughput JPEG 2000
}

_END, _PADDING = b"\xff\xd9", 64
"""The end mark of all these, and more than the bytes that may lie behind it."""

DECODER_DEPENDENCIES = dict.fromkeys(_CODECS, ("imagecodecs",))
"""What pydicom names where the plug-in lacks it."""


def is_available(syntax: str) -> bool:
    """Whether imagecodecs is installed."""
    return find_spec("imagecodecs") is not None


def plugin(syntax: str) -> str:
    """Ours for the compressions that it knows, "" for what pydicom chooses.

    Pillow, pydicom's choice for JPEG 2000, shifts values with a sign, reads what is cut off without
    a word and no high-throughput JPEG 2000.
    """
    return "imagecodecs" if syntax in _CODECS and is_available(syntax) else ""


@cache
def register() -> None:
    """Let pydicom find the plug-in."""
    from pydicom.pixels.decoders.base import get_decoder

    for syntax in _CODECS:
        get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))


def decode_frame(source: bytes, runner: Any) -> bytearray:
    """The values of one frame, colours by pixel."""
    import imagecodecs

    if _END not in source[-_PADDING:]:
        raise ValueError("a frame has no end")  # libjpeg and OpenJPEG would read some of it
    decoder = _CODECS[runner.transfer_syntax]
    # Colours are converted by pydicom, not here.
    as_stored = {"colorspace": "RGB", "outcolorspace": "RGB"}
    options = as_stored if decoder == "jpeg8_decode" and runner.samples_per_pixel > 1 else {}
    values = getattr(imagecodecs, decoder)(source, **options)
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return bytearray(values.tobytes())
