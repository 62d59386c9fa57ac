"""DICOM images, by pydicom (PS3.3, sections C.7.6 and C.11).

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Shaped

from dino.data.images.image_errors import ImageError, missing_extra
from dino.data.images.pixel_format import (
    PixelFormat,
    Stream,
    ValueInfo,
    channels_first,
    check_size,
)


def read_dicom(
    file: Stream, name: str, expected: PixelFormat
) -> tuple[Shaped[np.ndarray, "C H W"], ValueInfo]:
    """A DICOM image in its units (such as Hounsfield), as float32, or its colours as RGB.

    Raises:
        ImageError: if it has no pixels, no such frame, several of which none is chosen, or an
            unknown compression, is absurdly large, or if pydicom or the decoder of its compression
            is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_color_lut
    except ImportError:
        raise missing_extra(name, "it is a DICOM image", "dicom") from None
    data = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    if "Rows" not in data or "Columns" not in data:
        kind = data.get("Modality") or getattr(data.get("SOPClassUID"), "name", "") or "unknown"
        raise ImageError(name, f"it is a DICOM file without pixels ({kind})", "not an image")
    frame = _frame(int(data.get("NumberOfFrames") or 1), name, expected)
    check_size(name, int(data.Rows) * int(data.Columns) * int(data.get("SamplesPerPixel") or 1))
    values = _decoded(file, data, name, frame)
    photometric, bits = data.get("PhotometricInterpretation"), int(data.get("BitsStored") or 8)
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(values, data)
        return channels_first(colours, name, expected), ValueInfo(channels=3)
    if values.ndim == 3:
        return np.moveaxis(values, 2, 0), ValueInfo(bits=bits)
    return _rescaled(values, data, frame)[None], ValueInfo(
        bits=bits, inverted=photometric == "MONOCHROME1", window=_window(data, frame)
    )


def count_frames(file: Stream) -> int:
    """The number of frames of a DICOM file; 1 without pydicom."""
    try:
        import pydicom
    except ImportError:
        return 1
    tags = ["NumberOfFrames"]
    data = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
    return int(data.get("NumberOfFrames") or 1)


def _frame(frames: int, name: str, expected: PixelFormat) -> int:
    if expected.page is None and frames > 1:
        reason = (
            f"it is a stack of {frames} frames: choose one by --page NUMBER, from 0, or take all "
            "as images, by --data 'FOLDER?pages=all'"
        )
        raise ImageError(name, reason, "misfit")
    frame = expected.page or 0
    if frame >= frames:
        raise ImageError(name, f"it has {frames} frames, no {frame}", "misfit")
    return frame


# ---------------------------------------------------------------------------------- decoding
def _decoded(file: Stream, data: Any, name: str, frame: int) -> np.ndarray:
    """The values of one frame, [H, W] or [H, W, 3]; the others are not decoded."""
    import pydicom
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    from dino.data.images import dicom_codecs

    syntax, source = data.file_meta.get("TransferSyntaxUID"), None
    if syntax is None or syntax.is_deflated:  # pydicom finds a frame in other files by itself
        file.seek(0)
        source = pydicom.dcmread(file, force=True)
        if syntax is None:
            implicit, little = source.original_encoding
            uid = pydicom.uid
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            syntax = uid.ImplicitVRLittleEndian if implicit else explicit
            source.file_meta.TransferSyntaxUID = syntax
    dicom_codecs.register()
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        reason = f"it is compressed as {syntax.name}: decompress it, such as by gdcmconv --raw"
        raise ImageError(name, reason, "misfit") from None
    if not available:
        raise missing_extra(name, f"it is compressed as {syntax.name}", "dicom")
    values: np.ndarray = pixel_array(file if source is None else source, index=frame)
    return values


# ---------------------------------------------------------------------------------- values
def _rescaled(values: np.ndarray, data: Any, frame: int) -> np.ndarray:
    """The output of the modality transform (C.11.1)."""
    from pydicom.pixels.processing import apply_modality_lut

    if data.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(values, data), dtype=np.float32)
    found = _of_frame(data, frame, "PixelValueTransformationSequence", "RescaleSlope")
    slope = 1.0 if found is None else found
    found = _of_frame(data, frame, "PixelValueTransformationSequence", "RescaleIntercept")
    return (values * slope + (found or 0.0)).astype(np.float32)


def _window(data: Any, frame: int) -> tuple[float, float] | None:
    """The values that the first window of a file makes black and white (C.11.2.1)."""
    centre, width = (
        _of_frame(data, frame, "FrameVOILUTSequence", key)
        for key in ("WindowCenter", "WindowWidth")
    )
    if centre is None or width is None:
        return None
    if data.get("VOILUTFunction", "LINEAR") == "LINEAR":
        centre, width = centre - 0.5, width - 1
    low = centre - width / 2
    return low, low + max(width, 1e-3)  # of 1 or less: a threshold


def _of_frame(data: Any, frame: int, group: str, key: str) -> float | None:
    """The first value of a tag, from a frame's functional groups, the shared ones or the file."""
    groups = [data]
    for name, place in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        items = data.get(name) or []
        if place < len(items) and items[place].get(group):
            groups.append(items[place][group][0])
    for found in reversed(groups):
        values = np.atleast_1d(np.asarray(found.get(key), dtype=object))
        if values.size and values[0] not in (None, ""):
            return float(values[0])
    return None
