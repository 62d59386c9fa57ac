"""From a file to pixels: reading, cropping, and the fixed preprocessing of evaluation.

Images are `PIL.Image` RGB or uint8 tensors [C, H, W]; nothing becomes floating point before the
device has it, except in `Preprocessing`, which ends in the network's input.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino.files import UserError

Sample: TypeAlias = Image.Image | UInt8[Tensor, "3 H W"]
"""What a source gives: an RGB picture, or its pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Everything that Pillow's readers raise for damaged bytes. UnidentifiedImageError is an OSError.
_DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)


Defect = Literal["missing", "unreadable", "empty", "not an image", "damaged", "too large", "misfit"]
"""Why an image cannot be used, in kinds that can be counted (`ImageError.reason` has the details).

Missing: no such file. Unreadable: the system refuses. Empty: no bytes. Not an image: bytes in no
known format. Damaged: truncated or corrupt. Too large: a decompression bomb. Misfit: pixels that
the network does not take.
"""


class ImageError(UserError):
    """An image that cannot be used.

    Attributes:
        path: where it lies.
        reason: what is wrong with it, in a few words.
        defect: which kind of wrong.
    """

    def __init__(self, path: str, reason: str, defect: Defect = "damaged") -> None:
        super().__init__(path, reason, defect)  # all arguments, so that it survives pickling
        self.path, self.reason = path, reason
        self.defect: Defect = defect

    def __str__(self) -> str:
        """One sentence naming the file."""
        return f"{self.path} cannot be read as an image: {self.reason}"


def count_defects(defects: Iterable[str]) -> str:
    """Such as "12 damaged, 3 missing", the most frequent first."""
    counts = sorted(Counter(defects).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {defect}" for defect, count in counts)


# ---------------------------------------------------------------------------------- reading
def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as upright RGB.

    The EXIF orientation is applied, the first frame of an animation taken. What is transparent
    becomes white. Grey is repeated in three channels; 16 bits are divided by 257, so that equal
    values stay equal from image to image; 32-bit integers and floats, which have no known range,
    are stretched from their smallest to their largest value.

    Raises:
        ImageError: if the file is missing, damaged, not an image or absurdly large.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(str(path), "there is no such file", "missing") from None
    except UnidentifiedImageError:
        if _is_empty(Path(path)):
            raise ImageError(str(path), "it is empty", "empty") from None
        reason = "its bytes are in no known image format"
        raise ImageError(str(path), reason, "not an image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(path), str(error), "too large") from error
    except _DAMAGE as error:
        refused = isinstance(error, OSError) and error.errno is not None  # by the system
        reason = str(error) or type(error).__name__
        raise ImageError(str(path), reason, "unreadable" if refused else "damaged") from error


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:  # gone by now
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB, as `read_image` describes."""
    if image.mode == "RGB":
        return image
    # Pillow before 10.3 opens 16-bit PNGs in its mode for 32 bits, which PNG does not have.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.uint16)
        return Image.fromarray((levels // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretch(np.asarray(image, dtype=np.float64))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    """Map the finite range of `values` to 0..255; a constant image becomes black."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scale = 255.0 / (high - low) if high > low else 0.0
    inside = np.clip(np.nan_to_num(values, nan=low), low, high)
    levels: np.ndarray = np.rint((inside - low) * scale).astype(np.uint8)
    return levels


def to_tensor(image: Image.Image) -> UInt8[Tensor, "C H W"]:
    """The pixels of an 8-bit image as a tensor (strided channels last, as they lie in memory)."""
    pixels = np.array(image)  # copies: torch tensors must own writable memory
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pil(image: UInt8[Tensor, "C H W"]) -> Image.Image:
    """The inverse of `to_tensor` for three channels."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def as_pixels(sample: Sample) -> UInt8[Tensor, "3 H W"]:
    """A sample as a tensor."""
    return sample if isinstance(sample, Tensor) else to_tensor(sample)


def as_picture(sample: Sample) -> Image.Image:
    """A sample as a picture."""
    return to_pil(sample) if isinstance(sample, Tensor) else sample


def as_image(sample: Any, name: str) -> Sample:
    """Take a sample of a user's data set for what it is: an image, or a tuple that starts with one.

    Args:
        sample: a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W] or [H, W, C] with one
            or three channels; or a tuple or list whose first item is one.
        name: what to call the sample in a message.

    Returns:
        An RGB image or a uint8 tensor [3, H, W].

    Raises:
        ImageError: if it is none of these.
    """
    if isinstance(sample, (tuple, list)) and len(sample) > 0:
        sample = sample[0]
    if isinstance(sample, Image.Image):
        return to_rgb(sample)
    if isinstance(sample, np.ndarray) and sample.ndim in (2, 3) and sample.dtype == np.uint8:
        pixels = sample if sample.ndim == 3 else sample[:, :, None]
        sample = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if isinstance(sample, Tensor) and _is_image(sample):
        return sample.expand(3, -1, -1)
    kind = f"a {type(sample).__name__}"
    if isinstance(sample, (Tensor, np.ndarray)):
        kind += f" of {sample.dtype} and shape {tuple(sample.shape)}"
    raise ImageError(
        name,
        f"it is {kind}; return a PIL image, a uint8 tensor [C,H,W] or a uint8 array [H,W,C] "
        "with 1 or 3 channels (no ToTensor or Normalize: dino does that)",
        "misfit",
    )


def _is_image(tensor: Tensor) -> bool:
    shape = tuple(tensor.shape)
    return tensor.dtype == torch.uint8 and len(shape) == 3 and shape[0] in (1, 3) and all(shape)


# ---------------------------------------------------------------------------------- cropping
def crop_resize(
    image: UInt8[Tensor, "C H W"], box: tuple[int, int, int, int], size: int, flip: bool
) -> UInt8[Tensor, "C {size} {size}"]:
    """Crop a box and resize it with antialiased bicubic interpolation, as Pillow does.

    PyTorch resizes uint8 on the CPU in fixed-point arithmetic with vector instructions, fastest
    from pixels that lie channels last (as `to_tensor` leaves them). The result is that of Pillow's
    bicubic `resize` of the crop, first in width, then in height, within one level and nearly always
    exactly. (Newer Pillows begin with the height where that is cheaper; the levels between the two
    passes are then rounded and clipped elsewhere, and a fifth of the values differ by one.)

    Args:
        image: the whole image.
        box: top, left, height and width of the crop in pixels, inside the image.
        size: side of the result in pixels.
        flip: mirror the result horizontally.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    view = torch.nn.functional.interpolate(
        crop.unsqueeze(0), (size, size), mode="bicubic", antialias=True
    ).squeeze(0)
    return view.flip(-1) if flip else view


# ---------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class Preprocessing:
    """The fixed transform that belongs to a set of weights (DINO, appendix F).

    Exactly torchvision's `Resize` and `CenterCrop` on PIL images, `ToTensor`, `Normalize`.

    Args:
        resize: length of the shorter side after resizing, in pixels.
        crop: side of the central square that remains; padded with black where it is larger.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        interpolation: of the resize; always antialiased.
        squash: resize both sides to `resize`, whatever the aspect ratio (as transformers does),
            instead of the shorter side.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    squash: bool = False

    def __call__(self, image: Image.Image) -> Float[Tensor, "C {self.crop} {self.crop}"]:
        """Turn a PIL image (any mode) into the network's input."""
        from torchvision.transforms import functional as F  # slow to import, idle in training

        mode = F.InterpolationMode(self.interpolation)
        sides = [self.resize] * (2 if self.squash else 1)  # one means: the shorter
        image = F.resize(to_rgb(image), sides, mode)
        pixels = F.to_tensor(F.center_crop(image, [self.crop]))
        result: Tensor = F.normalize(pixels, list(self.mean), list(self.std))
        return result

    @classmethod
    def for_size(cls, size: int) -> Preprocessing:
        """The paper's transform for a network of `size` px: 256 / 224 of it, center-cropped."""
        return cls(resize=round(size * 256 / 224), crop=size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a journey through JSON.

        Raises:
            UserError: if a name is unknown or `interpolation` is neither bicubic nor bilinear.
        """
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise UserError(f"unknown preprocessing settings: {', '.join(unknown)}")
        if values.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
            raise UserError(f"interpolation must be bicubic or bilinear: {values}")
        settings: dict[str, Any] = dict(values)
        for name in settings.keys() & {"mean", "std"}:
            settings[name] = tuple(settings[name])
        return cls(**settings)
