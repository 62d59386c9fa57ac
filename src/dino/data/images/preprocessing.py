"""The fixed transform of evaluation, from an image to the network's input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture, to_rgb
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD, RGB, PixelFormat
from dino.settings import parsed

LONGEST = 8
"""Ratio of the sides above which an image is cropped before it is resized."""


@dataclass(frozen=True)
class Preprocessing:
    """The fixed transform that belongs to a set of weights (DINO, appendix F).

    For RGB exactly torchvision's `Resize` and `CenterCrop` on PIL images, `ToTensor`, `Normalize`;
    other channels are resized by the same filter as tensors.

    Args:
        resize: length of the shorter side after resizing, in pixels.
        crop: side of the central square that remains; padded with black where it is larger.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        interpolation: of the resize; always antialiased.
        squash: resize both sides to `resize`, whatever the aspect ratio (as transformers does),
            instead of the shorter side.
        pixels: channels and range of the images.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    squash: bool = False
    pixels: PixelFormat = RGB

    def __call__(self, image: Sample) -> Float[Tensor, "C {self.crop} {self.crop}"]:
        """Turn a sample (a PIL image may have any mode) into the network's input."""
        from torchvision.transforms import functional as F  # slow to import, idle in training

        mode = F.InterpolationMode(self.interpolation)
        sides = [self.resize] * (2 if self.squash else 1)  # one means: the shorter
        if self.pixels.plain or isinstance(image, Image.Image):
            image = to_rgb(as_picture(image))
        if not self.squash:
            image = F.center_crop(image, self._visible(*F.get_dimensions(image)[1:]))
        if isinstance(image, Image.Image):
            pixels = F.to_tensor(F.center_crop(F.resize(image, sides, mode), [self.crop]))
        else:
            image = F.resize(image, sides, mode, antialias=True)
            pixels = F.center_crop(image, [self.crop]) / 255
        result: Tensor = F.normalize(pixels, list(self.mean), list(self.std))
        return result

    def _visible(self, height: int, width: int) -> list[int]:
        """Height and width of the centre of an image that the crop can reach.

        Resized in full, 20,000 x 1 pixels would take gigabytes. The centre stays the same.
        """
        limit = min(height, width) * (LONGEST + 2 * self.crop // self.resize)
        return [side - 2 * max(0, -((limit - side) // 2)) for side in (height, width)]

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
            UserError: if a name is unknown or a value does not fit.
        """
        pixels = parsed(PixelFormat, values.get("pixels", {}), "the pixel format")
        return parsed(cls, {**values, "pixels": pixels}, "the preprocessing")
