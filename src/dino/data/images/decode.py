"""From a file to pixels: opening, decoding and cropping.

Images are `PIL.Image` RGB or uint8 tensors [C, H, W]; nothing becomes floating point before the
device has it, except in `Preprocessing`, which ends in the network's input.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dino.data.images import bit_depth
from dino.data.images.dicom import count_frames, read_dicom
from dino.data.images.fits import read_fits
from dino.data.images.image_errors import ImageError, missing_extra
from dino.data.images.library_messages import Messages, log_and_stderr, python_warnings
from dino.data.images.metadata import pixels_only
from dino.data.images.npy import read_npy
from dino.data.images.other_formats import recognized, unidentified
from dino.data.images.pixel_format import (
    CUT,
    NO_INFO,
    RGB,
    PixelFormat,
    Stream,
    ValueInfo,
    check_size,
    kind_of,
    planes,
)
from dino.data.images.tiff import count_pages, pillow_reads, read_tiff
from dino.files import UserError

Sample: TypeAlias = Image.Image | UInt8[Tensor, "C H W"]
"""What a source gives: an RGB picture, or its pixels."""

LARGE = 2**25
"""Pixels above which a picture is converted a few rows at a time."""

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------------------------- opened images
class OpenedImage:
    """An image whose size is known and whose pixels are decoded on request; see `open_image`.

    Its values, of any type, are in memory; `unusable` is the reason if they cannot be decoded.

    Attributes:
        size: height and width in pixels, upright.
        stored: channels and bits of the file.
        info: what the file says about its values.
    """

    def __init__(
        self,
        values: Shaped[np.ndarray, "stored H W"],
        name: str,
        pixels: PixelFormat,
        info: ValueInfo = NO_INFO,
        unusable: str | None = None,
    ) -> None:
        self._values, self._name, self._pixels, self._unusable = values, name, pixels, unusable
        self.size, self.info = (values.shape[1], values.shape[2]), info
        self.stored = bit_depth.of_values(values, info)

    def decode(self, factor: int = 1) -> Sample:
        """The pixels: an RGB picture from Pillow for plain RGB, or a uint8 tensor [C, H, W].

        Args:
            factor: 1, 2, 4 or 8. A JPEG is decoded at 1 / `factor` of its height and width, by
                fewer coefficients of its cosine transform; other files at their full size.
        """
        if self._unusable is not None:
            raise ImageError(self._name, self._unusable, "misfit")
        levels = self._pixels.levels(self.values(), self.info)
        levels = self._pixels.with_channels(levels, self._name)
        # What was read may be read-only, or one plane for all channels.
        return torch.from_numpy(np.require(levels, requirements=["C", "W"]))

    def values(self) -> Shaped[np.ndarray, "C H W"]:
        """The values as they are stored, of any type."""
        return self._values


class _OpenedPicture(OpenedImage):
    """A picture of Pillow's, not decoded yet if it has a file; `stream` is None for one without."""

    def __init__(
        self, picture: Image.Image, name: str, pixels: PixelFormat, stream: Stream | None = None
    ) -> None:
        self._picture, self._name, self._pixels, self._stream = picture, name, pixels, stream
        self._unusable = None
        self.stored = bit_depth.of_picture(picture, stream)  # before a PNG is decoded for its EXIF
        if stream is not None:
            count = picture.width * picture.height * self.stored.channels
            check_size(name, count, self.stored.bytes)
        self._narrowed = stream is not None and bit_depth.narrowed(picture, self.stored, stream)
        self._spare = 0 if stream is None else bit_depth.spare_bits(picture, self.stored)
        deep = self._narrowed or self._spare
        self.info = ValueInfo(bits=self.stored.bits) if deep else NO_INFO
        self._orientation = 1
        self._error: Exception | None = None
        if stream is not None:
            try:
                self._orientation = picture.getexif().get(_ORIENTATION, 1)
            except Exception as error:  # damaged EXIF raises nearly anything
                # Of a PNG it decodes the pixels, and Pillow would return half of them next time.
                self._error = error if picture.format == "PNG" else None
        width, height = picture.size
        self.size = (width, height) if self._orientation in bit_depth.SWAPPED else (height, width)

    def decode(self, factor: int = 1) -> Sample:
        pixels = self._pixels
        # Of JPEG 2000 with more than 8 bits, Pillow makes white black, or darker.
        wraps = self._picture.format == "JPEG2000" and self.info.bits is not None
        if pixels.channels == 3 and pixels.low is None and pixels.nodata is None and not wraps:
            picture = self._upright(factor)
            large = picture.width * picture.height > LARGE and picture.mode[0] not in "IF"
            return _rgb_by_rows(picture) if large else to_rgb(picture)
        return super().decode()

    def values(self) -> Shaped[np.ndarray, "C H W"]:
        picture, stream, bits = self._picture, self._stream, self.stored.bits
        if stream is None or not self._narrowed:
            values = picture_values(self._upright(), self._pixels)
            return values >> self._spare if self._spare else values
        with log_and_stderr(Messages()):  # harmless, or part of the error
            return bit_depth.read_all_bits(
                picture, stream, self._name, self._pixels, bits, self._orientation
            )

    def _upright(self, factor: int = 1) -> Image.Image:
        picture = self._picture
        if self._stream is not None and factor > 1 and picture.format in ("JPEG", "MPO"):
            picture.draft(None, (picture.width // factor, picture.height // factor))
        try:
            if self._error is not None:
                raise self._error
            picture.load()
        except Exception as error:
            picture = _without_metadata(self._stream, error)
        if self._orientation in _UPRIGHT:
            turned = picture.transpose(_UPRIGHT[self._orientation])
            turned.format = picture.format
            return turned
        return picture


@contextmanager
def open_image(
    content: Any, name: str | None = None, pixels: PixelFormat = RGB
) -> Iterator[OpenedImage]:
    """Open an image; within the context, every error of reading it is an `ImageError`.

    The EXIF orientation is applied, the first frame of an animation taken. In RGB, what is
    transparent becomes white and grey is repeated in three channels. 16 bits are divided by 257, so
    that equal values stay equal from image to image; 32-bit integers and floats, which have no
    known range, are stretched from their smallest to their largest value, unless `pixels` has a
    range.

    Args:
        content: a path, or an open binary file that can seek; or a sample of a user's data set: a
            PIL image, a tensor [C, H, W] or an array [H, W] or [H, W, C] of 8 or 16-bit integers,
            or of any type if `pixels` has a range; or a tuple or list whose first item is one.
        name: of the image in messages; by default its path.
        pixels: channels and range expected.

    Raises:
        ImageError: if the file is missing, no regular file, damaged, not an image, absurdly large,
            or has other channels.
        UserError: if it needs a library that is not installed.
    """
    name = str(content) if name is None else name
    messages = Messages()
    try:
        with ExitStack() as stack:
            stack.enter_context(python_warnings(messages))
            if isinstance(content, (str, os.PathLike)):
                content = stack.enter_context(_open_regular(content, name))
            if hasattr(content, "read"):
                yield _opened_file(content, name, pixels, messages, stack)
            else:
                yield _opened_sample(content, name, pixels)
    except UserError:
        raise
    except FileNotFoundError:
        raise ImageError(name, "there is no such file", "missing") from None
    except Image.DecompressionBombError as error:
        pixels_found = "".join(re.findall(r"\((\d+) pixels", str(error))[:1])
        most = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        found = f"it has {int(pixels_found):,}, {most}" if pixels_found else f"it has {most}"
        raise ImageError(name, f"{found}: {CUT}", "too large") from error
    except MemoryError as error:
        raise ImageError(name, f"it does not fit into memory: {CUT}", "too large") from error
    except Exception as error:  # readers of damaged bytes raise everything that Python has
        by_system = isinstance(error, OSError) and error.errno is not None
        reason = (" ".join(str(error).split()) or type(error).__name__) + messages.first
        if reason.startswith(("Unsupported", "Unimplemented")):  # by Pillow, of BMP, DDS, ...
            raise ImageError(name, f"{reason}: convert it to PNG", "misfit") from error
        raise ImageError(name, reason, "unreadable" if by_system else "damaged") from error


def _opened_file(
    stream: Stream, name: str, pixels: PixelFormat, messages: Messages, stack: ExitStack
) -> OpenedImage:
    """An image file, by the library for its format."""
    kind = kind_of(stream, name)
    if kind != "picture":
        stack.enter_context(log_and_stderr(messages))
    if kind == "npy":
        return OpenedImage(read_npy(stream, name, pixels), name, pixels)
    if kind == "dicom":
        values, info = read_dicom(stream, name, pixels)
        return OpenedImage(values, name, pixels, info)
    if kind == "fits":
        values, info = read_fits(stream, name)
        return OpenedImage(values, name, pixels, info)
    if kind == "heif":
        return _opened_heif(stream, name, pixels)
    if kind == "tiff":
        return _opened_tiff(stream, name, pixels, stack)
    picture: Image.Image
    try:
        picture = stack.enter_context(Image.open(stream))
    except UnidentifiedImageError as error:
        try:
            picture = _without_metadata(stream, error)
        except UnidentifiedImageError:
            raise unidentified(stream, name) from None
    except (ValueError, OSError) as error:
        picture = _without_metadata(stream, error)
    if isinstance(picture, ImageFile.StubImageFile):  # which Pillow only identifies
        raise ImageError(name, recognized(stream, picture.format), "not an image")
    if picture.format == "EPS":  # Pillow would run it by Ghostscript
        raise ImageError(name, "it is a program in PostScript", "not an image")
    if picture.format == "JPEG2000" and not bit_depth.ends(stream):
        raise ValueError("its code stream has no end")  # Pillow would read some without a word
    _seek(picture, name, pixels)
    return _OpenedPicture(picture, name, pixels, stream)


def _without_metadata(stream: Stream | None, error: Exception) -> Image.Image:
    """The picture without its metadata, if those were damaged; raises `error` otherwise."""
    plain = None if stream is None else pixels_only(stream)
    if plain is None:
        raise error
    try:
        picture = Image.open(plain)
        picture.load()
    except Exception:
        raise error from None
    return picture


def _opened_heif(stream: Stream, name: str, pixels: PixelFormat) -> OpenedImage:
    """A picture in HEIC or HEIF, all its bits, by pillow-heif, which turns it upright."""
    try:
        import pillow_heif
    except ImportError:
        raise missing_extra(name, "it is a HEIC image", "heic") from None
    file = pillow_heif.open_heif(stream, convert_hdr_to_8bit=False, hdr_to_16bit=False)
    bits = int(file.info["bit_depth"])
    check_size(name, file.size[0] * file.size[1] * 4, 1 + (bits > 8))
    if bits == 8:
        return _OpenedPicture(file.to_pillow(), name, pixels)
    values = planes(np.asarray(file))[..., : file.size[0]]
    stored, transparent = len(values), len(values) in (2, 4)
    values = bit_depth.expected_colours(values, pixels, bits, transparent)
    return OpenedImage(values, name, pixels, ValueInfo(bits=bits, channels=stored))


def _opened_tiff(stream: Stream, name: str, pixels: PixelFormat, stack: ExitStack) -> OpenedImage:
    """By Pillow where it reads the values as they are stored, else by tifffile.

    Where the library of choice fails in the middle, the other is tried.
    """
    failed: Exception | None = None
    try:
        if (found := _tiff_by_pillow(stream, name, pixels, stack)) is not None:
            return found
    except (UserError, Image.DecompressionBombError, MemoryError):
        raise
    except UnidentifiedImageError:
        pass
    except Exception as error:
        failed = error
    try:
        stream.seek(0)
        values, info = read_tiff(stream, name, pixels)
        return OpenedImage(values, name, pixels, info)
    except (UserError, MemoryError):
        if failed is None:
            raise
    except Exception as error:
        failed = failed or error
        with suppress(Exception):
            stream.seek(0)
            if (found := _tiff_by_pillow(stream, name, pixels, stack, planar=True)) is not None:
                return found
    raise failed from None


def _tiff_by_pillow(
    stream: Stream, name: str, pixels: PixelFormat, stack: ExitStack, planar: bool = False
) -> OpenedImage | None:
    """A TIFF by Pillow; None where it would not read the values as they are stored."""
    picture = stack.enter_context(Image.open(stream))
    _seek(picture, name, pixels)
    if not pillow_reads(picture, name, pixels, planar):
        return None
    picture.load()
    return _OpenedPicture(picture, name, pixels, stream)


def _seek(picture: Image.Image, name: str, pixels: PixelFormat) -> None:
    if pixels.page:
        try:
            picture.seek(pixels.page)
        except EOFError:
            raise ImageError(name, f"it has no page {pixels.page}", "misfit") from None


def _opened_sample(sample: Any, name: str, pixels: PixelFormat) -> OpenedImage:
    """An item of a user's data set."""
    if isinstance(sample, (tuple, list)) and len(sample) > 0:
        sample = sample[0]
    if isinstance(sample, Image.Image):
        return _OpenedPicture(sample, name, pixels)
    values = sample.numpy(force=True) if isinstance(sample, Tensor) else sample
    numbers = isinstance(values, np.ndarray) and values.dtype.kind in "buif"
    if not numbers or values.ndim not in (2, 3) or 0 in values.shape:
        raise ImageError(name, _unusable(sample, pixels), "misfit")
    if values.ndim == 2 or not isinstance(sample, Tensor):
        values = planes(values)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    small = values.dtype.kind in "ui" and values.dtype.itemsize <= 2
    typed = pixels.low is not None or small
    unusable = None if typed else _unusable(sample, pixels, True)
    return OpenedImage(values, name, pixels, unusable=unusable)


def _unusable(sample: Any, pixels: PixelFormat, convertible: bool = False) -> str:
    """Why a sample is no image, and what to return instead; `convertible` if by another type."""
    found = f"it is a {type(sample).__name__}"
    if isinstance(sample, Mapping):
        names, item = ", ".join(map(repr, list(sample)[:4])), image_entry(sample)
        return f"{found} of {names or 'nothing'}; return the image alone, as in item{item}"
    if isinstance(sample, (Tensor, np.ndarray)):
        found += f" of {sample.dtype} and shape {tuple(sample.shape)}"
    if not convertible:
        counts = f"1 or {pixels.channels}" if pixels.channels == 3 else f"{pixels.channels}"
        return (
            f"{found}; return a PIL image, a uint8 tensor [C,H,W] or a uint8 array [H,W,C] with "
            f"{counts} channels"
        )
    integers = "int" in str(sample.dtype)
    convert = ".to(torch.uint8)" if isinstance(sample, Tensor) else ".astype(np.uint8)"
    convert = f"image{convert}" if integers else f"(255 * image).round(){convert}"
    return (
        f"{found}; return a PIL image or uint8 values, which are {convert} if these go from 0 to "
        f"{255 if integers else 1} (no ToTensor or Normalize: dino does that; other ranges need "
        "pixels.low and pixels.high, see dino data stats)"
    )


def image_entry(names: Iterable[Any]) -> str:
    """Such as "['image']", the index of the entry of a dictionary that seems to be the image."""
    listed = list(names)
    words = ("image", "img", "picture", "photo", "train")
    likely = [name for word in words for name in listed if word in str(name)]
    return f"[{[*likely, *listed, 'image'][0]!r}]"


def _open_regular(path: str | os.PathLike[str], name: str) -> Stream:
    """Open a regular file; a named pipe or a device could be read for ever."""
    # Not by pathlib, which interns each part of a path: that writes to memory shared by workers.
    stream = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ImageError(name, "it is a pipe or a device, no regular file", "unreadable")
    return stream


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer


def page_count(content: Any, name: str) -> int:
    """The number of pages of a TIFF or frames of a DICOM file; 1 of all else.

    What cannot be read counts as one, too: reading it says why.
    """
    with ExitStack() as stack, suppress(Exception):
        stack.enter_context(python_warnings(Messages()))
        stack.enter_context(log_and_stderr(Messages()))
        if isinstance(content, (str, os.PathLike)):
            content = stack.enter_context(_open_regular(content, name))
        count = {"tiff": count_pages, "dicom": count_frames}.get(kind_of(content, name))
        return 1 if count is None else max(1, count(content))
    return 1


def read_image(content: Any, name: str | None = None, pixels: PixelFormat = RGB) -> Sample:
    """An image at its full size; see `open_image`."""
    with open_image(content, name, pixels) as image:
        return image.decode()


def read_picture(file: str | os.PathLike[str] | Stream) -> Image.Image:
    """An image file as an RGB picture, see `open_image`."""
    return as_picture(read_image(file))


# ---------------------------------------------------------------------------------- pictures
def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB, as `open_image` describes."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB":
        if not isinstance(transparent, tuple):
            return image
        if max(transparent) > 255:  # Pillow reads 8 of a PNG's 16 bits
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if (values := _deep_values(image)) is not None:
        return Image.fromarray(RGB.levels(values[None])[0]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _rgb_by_rows(image: Image.Image) -> UInt8[Tensor, "C H W"]:
    """`to_rgb` as a tensor, a few rows at a time: whole copies of a large image take gigabytes."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, LARGE // (8 * image.width))
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        pixels[top : box[3]] = np.asarray(to_rgb(image.crop(box)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def picture_values(image: Image.Image, pixels: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A picture's values: grey or RGB for 1 or 3 channels, else those of its mode."""
    if (values := _deep_values(image)) is not None:
        return values[None]
    if pixels.channels in (1, 3):
        image = to_rgb(image)
    elif image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return planes(np.asarray(image.convert("L") if pixels.channels == 1 else image))


def _deep_values(image: Image.Image) -> np.ndarray | None:
    """Values of a grey image of 16 or 32 bits; None for others."""
    # Pillow opens 16-bit PGMs, and before 10.3 PNGs, in its mode for 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint16)
        if isinstance(transparent := image.info.get("transparency"), int):  # of a PNG
            values[values == transparent] = 65535
        return values
    return np.asarray(image) if image.mode in ("I", "F") else None


def to_tensor(image: Image.Image) -> UInt8[Tensor, "C H W"]:
    """The pixels of an 8-bit image as a tensor (strided channels last, as they lie in memory)."""
    pixels = np.atleast_3d(np.array(image))  # copies: tensors need writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pil(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """The inverse of `to_tensor`."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def as_pixels(sample: Sample) -> UInt8[Tensor, "C H W"]:
    """A sample as a tensor."""
    return sample if isinstance(sample, Tensor) else to_tensor(sample)


def as_picture(sample: Sample) -> Image.Image:
    """A sample as an RGB picture to show; of other channels than three, their mean."""
    if not isinstance(sample, Tensor):
        return sample
    if len(sample) == 3:
        return to_pil(sample)
    return to_pil(sample.float().mean(0, keepdim=True).to(torch.uint8).expand(3, -1, -1))


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
    exactly. (Newer Pillows begin with the height where that is cheaper; then a fifth of the values
    differ by one.)

    Args:
        image: the entire image.
        box: top, left, height and width of the crop in pixels, inside the image.
        size: side of the result in pixels.
        flip: mirror the result horizontally.
        mode: of the interpolation.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    view = F.interpolate(crop[None], (size, size), mode=mode, antialias=True)[0]
    return view.flip(-1) if flip else view
