"""Images resized to complete patches, with nothing cropped or padded.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino.data.images.decode import Sample, to_tensor
from dino.data.images.preprocessing import LONGEST, Preprocessing
from dino.data.views.photometric import normalize
from dino.files import UserError


def patch_multiples(
    height: int, width: int, size: int, patch: int, keep_aspect: bool
) -> tuple[int, int]:
    """Height and width in pixels that an image is resized to, both multiples of `patch`.

    Args:
        height: of the image.
        width: of the image.
        size: side of a square, or with `keep_aspect` of the shorter side, to the nearest multiple.
        patch: side of a patch.
        keep_aspect: keep the ratio of the sides, up to `LONGEST`.

    Raises:
        UserError: if no patch fits.
    """
    if size < patch:
        raise UserError(f"--size {size} holds no patch of {patch} px: set it to {patch} or more")
    shorter = min(height, width)
    ratios = [min(side / shorter, LONGEST) if keep_aspect else 1.0 for side in (height, width)]
    high, wide = (max(1, round(size * ratio / patch)) * patch for ratio in ratios)
    return high, wide


def shorter_side(height: int, width: int, longest: int) -> int:
    """The shorter side of an image, ratio kept up to `LONGEST`, whose longer side is `longest`."""
    ratio = min(max(height, width) / min(height, width), LONGEST)
    return max(1, round(longest / ratio))


def resize_to_patches(
    image: Sample, size: int, patch: int, keep_aspect: bool
) -> UInt8[Tensor, "C _ _"]:
    """The levels of an image at the size of `patch_multiples`, by an antialiased bilinear filter.

    Raises:
        UserError: if no patch fits.
    """
    if isinstance(image, Image.Image):
        height, width = patch_multiples(image.height, image.width, size, patch, keep_aspect)
        return to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    sides = patch_multiples(image.shape[1], image.shape[2], size, patch, keep_aspect)
    return F.interpolate(image[None], sides, mode="bilinear", antialias=True)[0]


def patch_input(
    image: Sample,
    size: int,
    patch: int,
    keep_aspect: bool,
    transform: Preprocessing,
    device: torch.device,
) -> Float[Tensor, "1 C _ _"]:
    """An image of `resize_to_patches` with the mean and deviation of a network's transform.

    Raises:
        UserError: if no patch fits.
    """
    pixels = resize_to_patches(image, size, patch, keep_aspect)
    return normalize(pixels.to(device), transform.mean, transform.std)[None]
