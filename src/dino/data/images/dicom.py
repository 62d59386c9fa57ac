"""DICOM images, by pydicom (PS3.3, sections C.7.6 and C.11).

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from dino.data.images.image_errors import ImageError, missing_extra
from dino.data.images.pixel_format import (
    PixelFormat,
    Stream,
    ValueInfo,
    by_rows,
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
        uid = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
        kind = data.get("Modality") or getattr(uid, "name", "") or "unknown"
        raise ImageError(name, f"it is a DICOM file without pixels ({kind})", "not an image")
    frame = _frame(int(data.get("NumberOfFrames") or 1), name, expected)
    photometric, bits = data.get("PhotometricInterpretation"), int(data.get("BitsStored") or 8)
    samples = int(data.get("SamplesPerPixel") or 1)
    item = {"PALETTE COLOR": 6}.get(photometric, 4 if samples == 1 else -(-bits // 8))
    check_size(name, int(data.Rows) * int(data.Columns) * samples, item)
    values = _decoded(file, data, name, frame)
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(values, data)
        return channels_first(colours, name, expected), ValueInfo(channels=3)
    if values.ndim == 3:
        return np.moveaxis(values, 2, 0), ValueInfo(bits=bits)
    padding = _padding(values, data)
    if padding is not None:
        values = np.where(padding, values[padding].max(initial=values.min()), values)
    rescaled = by_rows(partial(_rescaled, data=data, frame=frame), values[None])
    return rescaled, ValueInfo(
        bits=bits,
        inverted=photometric == "MONOCHROME1",
        nodata=None if padding is None or not padding.any() else float(rescaled[0][padding][0]),
        window=_window(data, frame),
    )


def _padding(values: np.ndarray, data: Any) -> Bool[np.ndarray, "H W"] | None:
    """Where a scanner saw nothing (C.7.5.1.1.2); None if the file does not say."""
    first = data.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = data.get("PixelPaddingRangeLimit")
    low, high = sorted((first, last if isinstance(last, int) else first))
    return (values >= low) & (values <= high)


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
    """The values of one frame, [H, W] or [H, W, 3]; the others are not decoded.

    `data` was read last, up to the pixels.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    from dino.data.images import dicom_codecs

    syntax = data.file_meta.get("TransferSyntaxUID")
    whole = syntax is None or syntax.is_deflated  # pydicom finds a frame in other files by itself
    if not whole and not syntax.is_encapsulated:
        _check_length(file, data, name, frame)
    source: Any = _entire(file) if whole else file
    syntax = source.file_meta.TransferSyntaxUID if whole else syntax
    dicom_codecs.register()
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        reason = f"it is compressed as {syntax.name}: decompress it, such as by gdcmconv --raw"
        raise ImageError(name, reason, "misfit") from None
    if not available:
        raise missing_extra(name, f"it is compressed as {syntax.name}", "dicom")
    read = partial(pixel_array, index=frame, decoding_plugin=dicom_codecs.plugin(syntax))
    try:
        values: np.ndarray = read(source)
    except MemoryError:
        raise
    except AttributeError as error:
        if "no pixel data" not in str(error):
            raise
        raise ImageError(name, "it is a DICOM file without pixels", "not an image") from None
    except Exception:
        if whole:
            raise
        values = read(_entire(file))  # of a file that mixes encodings
    return values


def _check_length(file: Stream, data: Any, name: str, frame: int) -> None:
    """Refuse a file that ends before its frame does, where pydicom would read less.

    The file's position is that of its pixels.
    """
    start = file.tell()
    samples = int(data.get("SamplesPerPixel") or 1)
    if data.get("PhotometricInterpretation") == "YBR_FULL_422":
        samples = 2
    bits = int(data.Rows) * int(data.Columns) * samples * int(data.get("BitsAllocated") or 8)
    left = file.seek(0, 2) - start
    header = 8 if data.file_meta.TransferSyntaxUID.is_implicit_VR else 12
    if left == 0:
        raise ImageError(name, "it is a DICOM file without pixels", "not an image")
    if left - header < (frame + 1) * bits // 8:
        raise ValueError("it ends in the middle of its pixels")


def _entire(file: Stream) -> Any:
    """The data set with its pixels, and the transfer syntax that its bytes have."""
    import pydicom

    file.seek(0)
    data = pydicom.dcmread(file, force=True)
    if data.file_meta.get("TransferSyntaxUID") is None:
        implicit, little = data.original_encoding
        uid = pydicom.uid
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return data


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
