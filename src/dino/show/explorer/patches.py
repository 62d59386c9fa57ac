"""Images as the network sees them in the page: patch features, and attention where it has one.

Shapes: h w patches, D embed_dim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture
from dino.data.images.patch_grid import patch_input, patch_multiples
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.named_inputs import named_inputs
from dino.files import UserError
from dino.models.attention import attention_maps
from dino.models.backbone import Backbone
from dino.models.inputs import read_sample
from dino.runtime import memory_errors

MOST = 64
"""Images of one page."""

PATCHES = MOST * 60 * 60
"""Patches of all images of one page: with those of ViT-S it has some 70 MB."""


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
        images: a PIL image, an array, or whatever `named_inputs` takes (files, folders, patterns,
            lists, `demo`), or a sequence of these.
        pixels: channels and range of the network's images.

    Raises:
        UserError: for an image that cannot be read, a video, none, or more than `MOST`.
    """
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    items = list(images) if several else [images]
    paths = [os.fspath(item) for item in items if isinstance(item, (str, os.PathLike))]
    named = named_inputs(paths, pixels) if paths else []
    if videos := [one.path for one in named if one.source is None]:
        raise UserError(f"{videos[0]} is a video: save some of its frames as images")
    count = len(named) + len(items) - len(paths)
    if not 1 <= count <= MOST:
        raise UserError(f"{count:,} images are given: a page takes from 1 to {MOST} of them")
    found = [(one.title, one.source[one.index]) for one in named if one.source is not None]
    for number, item in enumerate(items, start=1):
        if not isinstance(item, (str, os.PathLike)):
            name = f"image {number}"
            found.append((name, read_sample(item, pixels, name)))
    return found


def check_patches(images: Sequence[tuple[str, Sample]], size: int, patch: int) -> None:
    """Raise `UserError` if the images have more than `PATCHES` patches together."""
    total = 0
    for _, image in images:
        width, height = as_picture(image).size
        rows, columns = patch_multiples(height, width, size, patch, True)
        total += rows * columns // patch**2
    if total > PATCHES:
        fitting = max(patch, int(size * (PATCHES / total) ** 0.5))
        raise UserError(
            f"at --size {size} the images have {total:,} patches, and a page takes {PATCHES:,}: "
            f"give fewer images, or about --size {fitting}"
        )


# ---------------------------------------------------------------------------------- the features
@torch.inference_mode()
def patch_features(backbone: Backbone, name: str, image: Sample, size: int) -> PatchFeatures:
    """The patch features of an image whose shorter side has `size` pixels.

    Both sides are resized to the nearest number of complete patches, and nothing is cropped.

    Raises:
        UserError: if no patch fits, the network takes no such size, the memory does not suffice, or
            the features are not finite.
    """
    device = next(backbone.parameters()).device
    patch, transform = backbone.patch_size or 1, backbone.preprocessing
    inputs = patch_input(image, size, patch, True, transform, device)
    try:
        with memory_errors("--size"):
            features = backbone.features(inputs).patches[-1, 0].float().cpu()
            maps = attention_maps(backbone, inputs)[0].float().cpu() if backbone.heads else None
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError):
        backbone.check_size(size)  # whose sentence names what the network takes
        raise
    if not features.isfinite().all():
        raise UserError("the features hold NaN or infinity: the network has diverged")
    return PatchFeatures(name, as_picture(image), features, maps)
