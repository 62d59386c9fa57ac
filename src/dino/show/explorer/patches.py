"""Images as the network sees them in the page: patch features, and attention where it has one.

Shapes: C channels, H W pixels, h w patches, D embed_dim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture, as_pixels
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.inputs import read_sample
from dino.runtime import memory_errors

MOST = 64
"""Images of one page."""


class PatchFeatures(NamedTuple):
    """An image and what the last block makes of it.

    Attributes:
        name: of the image, for its caption.
        picture: in RGB, at its full size.
        features: of each patch, on the CPU.
        attention: of the CLS token to the patches, by head; None for networks without one.
    """

    name: str
    picture: Image.Image
    features: Float[Tensor, "D h w"]
    attention: Float[Tensor, "heads h w"] | None


# ------------------------------------------------------------------------------------ the images
def named_images(images: Any, pixels: PixelFormat) -> list[tuple[str, Sample]]:
    """Images with names that tell them apart, without the folders that all of them lie in.

    Args:
        images: a file, a folder, a PIL image or an array, or a sequence of these.
        pixels: channels and range of the network's images.

    Raises:
        UserError: for an image that cannot be read, none, or more than `MOST`.
    """
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    found: list[Any] = []
    for item in images if several else [images]:
        found += _files(item, pixels) if _is_path(item) and Path(item).is_dir() else [item]
    if not 1 <= len(found) <= MOST:
        raise UserError(f"{len(found):,} images are given: a page takes from 1 to {MOST} of them")
    names = _names(found)
    return [
        (name, read_sample(item, pixels, name)) for name, item in zip(names, found, strict=True)
    ]


def _files(folder: str | os.PathLike[str], pixels: PixelFormat) -> list[Any]:
    source = open_source(folder, pixels)
    return [source.path(index) for index in range(len(source))]


def _names(images: Sequence[Any]) -> list[str]:
    """The ends of paths by which they differ; numbers for images without a path."""
    parts = [
        Path(item).parts if _is_path(item) else (f"image {number}",)
        for number, item in enumerate(images, start=1)
    ]
    depth = 1
    while len({one[-depth:] for one in parts}) < len({*parts}):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def _is_path(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


# ---------------------------------------------------------------------------------- the features
@torch.inference_mode()
def patch_features(backbone: Backbone, name: str, image: Sample, size: int) -> PatchFeatures:
    """The patch features of an image of `size` pixels on its longer side.

    Both sides are resized to the nearest number of complete patches, and nothing is cropped.

    Raises:
        UserError: if no patch fits, the network takes no such size, the memory does not suffice, or
            the features are not finite.
    """
    pixels = as_pixels(image)
    resized = F.interpolate(
        pixels[None], _sides(pixels, size, backbone.patch_size or 1), mode="bicubic", antialias=True
    )
    transform, device = backbone.preprocessing, next(backbone.parameters()).device
    inputs = normalize(resized, transform.mean, transform.std).to(device)
    found = _features(backbone, inputs, size)
    attention = found.attention_maps[0].float().cpu() if backbone.heads else None
    features = found.patches[-1, 0].float().cpu()
    if not features.isfinite().all():
        raise UserError("the features hold NaN or infinity: the network has diverged")
    return PatchFeatures(name, as_picture(image), features, attention)


def _sides(pixels: Tensor, size: int, patch: int) -> list[int]:
    if size < patch:
        raise UserError(f"--size {size} holds no patch of {patch} px: set it to {patch} or more")
    longest = max(pixels.shape[1:])
    return [max(1, round(size * side / longest / patch)) * patch for side in pixels.shape[1:]]


def _features(backbone: Backbone, inputs: Float[Tensor, "1 C H W"], size: int) -> Any:
    try:
        with memory_errors("--size"):
            return backbone.features(inputs, attention=backbone.heads > 0)
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError):
        backbone.check_size(size)  # whose sentence names what the network takes
        raise
