"""From a file to pixels: reading, cropping, and the fixed preprocessing of evaluation.

Images are `PIL.Image` RGB or uint8 tensors [C, H, W]; nothing becomes floating point before the
device has it, except in `Preprocessing`, which ends in the network's input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat, Stream, kind_of
from dino.data.images.readers import beyond_pillow, read_dicom, read_npy, read_tiff
from dino.files import UserError

Sample: TypeAlias = Image.Image | UInt8[Tensor, "C H W"]
"""What a source gives: an RGB picture, or its pixels."""

File: TypeAlias = str | os.PathLike[str] | Stream
"""A path, or an open binary file that can seek."""

Reduce: TypeAlias = Callable[[int, int], int]
"""Of an image's height and width in pixels: by how much its decoding may shrink it."""

_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


# ---------------------------------------------------------------------------------- reading
def read_image(
    file: File, name: str | None = None, pixels: PixelFormat = RGB, reduce: Reduce | None = None
) -> Sample:
    """Read an image file, upright.

    The EXIF orientation is applied, the first frame of an animation taken. In RGB, what is
    transparent becomes white and grey is repeated in three channels. 16 bits are divided by 257, so
    that equal values stay equal from image to image; 32-bit integers and floats, which have no
    known range, are stretched from their smallest to their largest value, unless `pixels` has a
    range.

    Args:
        file: a path, or an open binary file that can seek.
        name: what to call the image in a message; by default its path.
        pixels: channels and range expected.
        reduce: asked for the largest reduction, 1 to 8, that all crops allow (see
            `dino.data.images.jpeg_scale.reduction`). A JPEG may then be decoded at 1/2, 1/4 or 1/8
            of its height and width, by fewer coefficients of its cosine transform.

    Returns:
        An RGB picture where `pixels` asks for nothing else, or a tensor of its channels.

    Raises:
        ImageError: if the file is missing, damaged, not an image, absurdly large, or has other
            channels.
    """
    name = str(file) if name is None else name
    if pixels.channels == 3 and pixels.low is None:
        with _opened(file, name) as stream, _picture(stream, name) as picture:
            if picture is not None:
                return to_rgb(_upright(picture, name, pixels, reduce))
    values = read_values(file, name, pixels)
    return _levels(values, name, pixels)


def read_picture(file: File, name: str | None = None) -> Image.Image:
    """An image file as an RGB picture, see `read_image`."""
    return as_picture(read_image(file, name))


def read_values(
    file: File, name: str | None = None, pixels: PixelFormat = RGB
) -> Shaped[np.ndarray, "C H W"]:
    """The values of an image file as they are stored, of any type.

    Raises:
        ImageError: if the file is missing, damaged, not an image or absurdly large.
    """
    name = str(file) if name is None else name
    with _opened(file, name) as stream:
        kind = kind_of(stream, name)
        if kind == "npy":
            return read_npy(stream, name, pixels)
        if kind == "dicom":
            return read_dicom(stream, name, pixels)
        if kind == "tiff" and pixels.channels not in (1, 3):
            return read_tiff(stream, name, pixels)
        with _picture(stream, name) as picture:
            if picture is not None:
                return picture_values(_upright(picture, name, pixels), pixels)
        stream.seek(0)
        return read_tiff(stream, name, pixels)


def _levels(values: Shaped[np.ndarray, "own H W"], name: str, pixels: PixelFormat) -> Tensor:
    """As a tensor in memory of its own: what was read may be locked, or one plane for all."""
    levels = pixels.fit(pixels.levels(values), name)
    return torch.from_numpy(np.require(levels, requirements=["C", "W"]))


@contextmanager
def _picture(stream: Stream, name: str) -> Iterator[Image.Image | None]:
    """A file open in Pillow; None for one that others must read."""
    kind = kind_of(stream, name)
    if kind in ("npy", "dicom"):
        yield None
        return
    try:
        picture = Image.open(stream)
    except UnidentifiedImageError:
        if kind != "tiff":
            raise
        picture = None  # samples that Pillow has no mode for
    if picture is not None and picture.format == "EPS":  # Pillow would run it by Ghostscript
        raise ImageError(name, "it is a program in PostScript", "not an image")
    with picture or nullcontext():
        yield None if picture is None or beyond_pillow(picture, name) else picture


def _upright(
    picture: Image.Image, name: str, pixels: PixelFormat, reduce: Reduce | None = None
) -> Image.Image:
    """The page asked for, decoded and turned upright."""
    if pixels.page:
        try:
            picture.seek(pixels.page)
        except EOFError:
            raise ImageError(name, f"it has no page {pixels.page}", "misfit") from None
    if reduce is not None and picture.format == "JPEG":
        width, height = picture.size
        if picture.getexif().get(0x0112) in _SWAPPED:
            width, height = height, width
        factor = reduce(height, width)
        picture.draft(None, (picture.width // factor, picture.height // factor))
    ImageOps.exif_transpose(picture, in_place=True)
    picture.load()
    return picture


@contextmanager
def _opened(file: File, name: str) -> Iterator[Stream]:
    """An open file, and every error of reading it as an `ImageError`."""
    try:
        if isinstance(file, (str, os.PathLike)):
            with open(file, "rb") as stream:  # noqa: PTH123, pathlib interns, see `names.Files`
                yield stream
        else:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise ImageError(name, "there is no such file", "missing") from None
    except UnidentifiedImageError:
        reason = "its bytes are in no known image format"
        raise ImageError(name, reason, "not an image") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError(name, str(error) or "it does not fit into memory", "too large") from error
    except Exception as error:  # readers of damaged bytes raise everything that Python has
        refused = isinstance(error, OSError) and error.errno is not None  # by the system
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name, reason, "unreadable" if refused else "damaged") from error


# ---------------------------------------------------------------------------------- pictures
def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB, as `read_image` describes."""
    if image.mode == "RGB":
        return image
    if (values := _deep_values(image)) is not None:
        return Image.fromarray(RGB.levels(values[None])[0]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def picture_values(image: Image.Image, pixels: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A picture's values: grey or RGB where that is wanted, else its own channels."""
    values = _deep_values(image)
    if values is None and pixels.channels == 1:
        values = np.asarray(to_rgb(image).convert("L"))
    elif values is None and pixels.channels == 3:
        values = np.asarray(to_rgb(image))
    elif values is None:
        if image.mode == "P":
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        values = np.asarray(image)
    return values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)


def _deep_values(image: Image.Image) -> np.ndarray | None:
    """Values of a grey image of 16 or 32 bits; None for others."""
    # Pillow before 10.3 opens 16-bit PNGs in its mode for 32 bits, which PNG does not have.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image) if image.mode in ("I", "F") else None


def to_tensor(image: Image.Image) -> UInt8[Tensor, "C H W"]:
    """The pixels of an 8-bit image as a tensor (strided channels last, as they lie in memory)."""
    pixels = np.array(image)  # copies: torch tensors must own writable memory
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pil(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """The inverse of `to_tensor`."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def as_pixels(sample: Sample) -> UInt8[Tensor, "C H W"]:
    """A sample as a tensor."""
    return sample if isinstance(sample, Tensor) else to_tensor(sample)


def as_picture(sample: Sample) -> Image.Image:
    """A sample as an RGB picture to look at; of other channels than three, their mean."""
    if not isinstance(sample, Tensor):
        return sample
    if len(sample) == 3:
        return to_pil(sample)
    return to_pil(sample.float().mean(0, keepdim=True).to(torch.uint8).expand(3, -1, -1))


def as_image(sample: Any, name: str, pixels: PixelFormat = RGB) -> Sample:
    """Take a sample of a user's data set for what it is: an image, or a tuple that starts with one.

    Args:
        sample: a PIL image, a tensor [C, H, W] or an array [H, W] or [H, W, C] of 8 or 16-bit
            integers, or of any type if `pixels` has a range; or a tuple or list whose first item is
            one.
        name: what to call the sample in a message.
        pixels: channels and range expected.

    Returns:
        An RGB image or a uint8 tensor [C, H, W].

    Raises:
        ImageError: if it is none of these.
    """
    if isinstance(sample, (tuple, list)) and len(sample) > 0:
        sample = sample[0]
    if isinstance(sample, Image.Image) and pixels.channels == 3 and pixels.low is None:
        return to_rgb(sample)
    values = as_values(sample, name, pixels)
    if pixels.low is None and values.dtype not in (np.uint8, np.uint16, np.int16):
        raise ImageError(name, _unusable(sample, pixels), "misfit")
    return _levels(values, name, pixels)


def as_values(sample: Any, name: str, pixels: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """The values of a sample of a user's data set, of any type.

    Raises:
        ImageError: if it is no image.
    """
    if isinstance(sample, (tuple, list)) and len(sample) > 0:
        sample = sample[0]
    if isinstance(sample, Image.Image):
        return picture_values(sample, pixels)
    numbers = isinstance(sample, Tensor) or (
        isinstance(sample, np.ndarray) and sample.dtype.kind in "buif"
    )
    if not numbers or sample.ndim not in (2, 3) or 0 in sample.shape:
        raise ImageError(name, _unusable(sample, pixels), "misfit")
    if isinstance(sample, Tensor):
        values: np.ndarray = sample.numpy(force=True)
        return values if values.ndim == 3 else values[None]
    return sample[None] if sample.ndim == 2 else np.moveaxis(sample, 2, 0)


def _unusable(sample: Any, pixels: PixelFormat) -> str:
    kind = f"a {type(sample).__name__}"
    if isinstance(sample, (Tensor, np.ndarray)):
        kind += f" of {sample.dtype} and shape {tuple(sample.shape)}"
    shapes = f"with 1 or {pixels.channels}" if pixels.channels == 3 else f"with {pixels.channels}"
    return (
        f"it is {kind}; return a PIL image, a uint8 tensor [C,H,W] or a uint8 array [H,W,C] "
        f"{shapes} channels (no ToTensor or Normalize: dino does that; other types need the range "
        "of their values, see dino data stats)"
    )


# ---------------------------------------------------------------------------------- cropping
def crop_resize(
    image: UInt8[Tensor, "C H W"],
    box: tuple[int, int, int, int],
    size: int,
    flip: bool,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> UInt8[Tensor, "C {size} {size}"]:
    """Crop a box and resize it with antialiased interpolation, as Pillow does.

    PyTorch resizes uint8 on the CPU in fixed-point arithmetic with vector instructions, fastest
    from pixels that lie channels last (as `to_tensor` leaves them). The result is that of Pillow's
    `resize` of the crop, first in width, then in height, within one level and nearly always
    exactly. (Newer Pillows begin with the height where that is cheaper; the levels between the two
    passes are then rounded and clipped elsewhere, and a fifth of the values differ by one.)

    Args:
        image: the whole image.
        box: top, left, height and width of the crop in pixels, inside the image.
        size: side of the result in pixels.
        flip: mirror the result horizontally.
        mode: of the interpolation.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    view = torch.nn.functional.interpolate(
        crop.unsqueeze(0), (size, size), mode=mode, antialias=True
    ).squeeze(0)
    return view.flip(-1) if flip else view
