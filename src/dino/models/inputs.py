"""What a user gives as images: files, pictures and arrays for `embed`, tensors for the network.

Shapes: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat, channels_first
from dino.data.sources.open import Source, open_source
from dino.files import UserError


# ------------------------------------------------------------------------------------ for `embed`
def read_images(images: Any, pixels: PixelFormat) -> Iterator[Sample]:
    """The images that `Backbone.embed` takes, in order, as samples for a `Preprocessing`.

    Raises:
        UserError: if `images` holds something else, or an image cannot be read.
    """
    if isinstance(images, Source) or (
        isinstance(images, (str, os.PathLike)) and os.path.isdir(images)  # noqa: PTH112
    ):
        source = open_source(images, pixels)
        yield from (source[index] for index in range(len(source)))
    else:
        for index, image in enumerate(_one_by_one(images)):
            yield read_sample(image, pixels, f"image {index}")


def read_sample(image: Any, pixels: PixelFormat, name: str = "the image") -> Sample:
    """A file, picture or array as a sample; of a pair (image, label) the image.

    Arrays and tensors are [H, W], [H, W, C] or [C, H, W]. Unless `pixels` has a range, floats go
    from 0 to 1, and integers are those that `open_image` takes.

    Raises:
        ImageError: if it is something else.
    """
    if isinstance(image, (tuple, list)) and image:
        image = image[0]
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, pixels=pixels)
    if isinstance(image, (np.ndarray, Tensor)):
        image = _channels_last(image, pixels, name)
    return read_image(image, name, pixels)


def _one_by_one(images: Any) -> Iterator[Any]:
    array = isinstance(images, (np.ndarray, Tensor))
    one = isinstance(images, (str, os.PathLike, Image.Image)) or hasattr(images, "read")
    if one or (array and images.ndim not in (1, 4)):
        return iter([images])
    if not isinstance(images, (Mapping, Set, bytes)):
        if isinstance(images, Iterable):
            return iter(images)
        if hasattr(images, "__getitem__") and hasattr(images, "__len__"):  # a torch Dataset
            return (images[index] for index in range(len(images)))
    raise UserError(
        f"cannot take images from a {type(images).__name__}: give a file, a folder, a PIL image, "
        "an array, or several of these"
    )


def _channels_last(image: np.ndarray | Tensor, pixels: PixelFormat, name: str) -> np.ndarray:
    """An array or tensor as an array [H, W, C]; floats from 0 to 1 as levels from 0 to 255."""
    if isinstance(image, Tensor):
        image = (image.float() if image.dtype is torch.bfloat16 else image).numpy(force=True)
    values = channels_first(image, name, pixels)
    channels = pixels.channels
    if len(values) not in {channels, 1 if channels == 3 else channels}:
        raise ImageError(
            name,
            f"its shape {image.shape} is neither [H, W, {channels}] nor [{channels}, H, W] nor "
            "[H, W]; several images in one array need four axes",
            "misfit",
        )
    if pixels.low is None and values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also of NaN
            raise ImageError(
                name,
                f"its values go from {low:g} to {high:g}: give floats from 0 to 1 or uint8 from 0 "
                "to 255, and normalised images to backbone(images)",
                "misfit",
            )
        values = np.rint(values * 255).astype(np.uint8)
    return np.moveaxis(values, 0, 2)


# ------------------------------------------------------------------------------------ for `forward`
def check_images(images: Any, channels: int, weight: Tensor | None) -> None:
    """Refuse images that a network cannot take.

    Args:
        images: a floating-point tensor [B, C, H, W] of the weights' type (under autocast of any
            floating type), on their device.
        channels: C.
        weight: any of the network's; None does without its type and device.

    Raises:
        UserError: in a sentence that says how to convert.
    """
    problem = None
    if not isinstance(images, Tensor):
        if isinstance(images, (np.ndarray, Image.Image, str, os.PathLike, Sequence)):
            kind = type(images).__name__
            problem = f"they are a {kind}: give them to backbone.embed, or a tensor [B, C, H, W]"
    elif not images.is_floating_point():
        problem = (
            f"they are {_name(images.dtype)}: give them to backbone.embed, or normalise each with "
            "backbone.preprocess"
        )
    elif images.ndim != 4 or images.shape[1] != channels:
        problem = _shape_problem(tuple(images.shape), channels)
    elif weight is not None and images.device != weight.device:
        problem = (
            f"they are on {images.device} and the network is on {weight.device}: give "
            f"images.to({str(weight.device)!r})"
        )
    elif (
        weight is not None
        and images.dtype != weight.dtype
        and not torch.is_autocast_enabled(images.device.type)
    ):
        problem = (
            f"they are {_name(images.dtype)} and the weights are {_name(weight.dtype)}: give "
            f"images.to({weight.dtype})"
        )
    if problem is not None:
        raise UserError(f"the network cannot take these images, since {problem}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_problem(shape: tuple[int, ...], channels: int) -> str:
    """Why a shape is not [B, C, H, W], and what makes it so."""
    found = f"their shape is {list(shape)}, not [B, {channels}, H, W]"
    if len(shape) == 3 and shape[0] == channels:
        return f"{found}: give images[None]"
    if len(shape) == 3 and shape[-1] == channels:
        return f"{found}: give images.permute(2, 0, 1)[None]"
    if len(shape) == 4 and shape[-1] == channels:
        return f"{found}: give images.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1] == 1 and channels == 3:
        return f"{found}: give images.expand(-1, 3, -1, -1)"
    if len(shape) == 4:
        return f"{found}: select {channels} channels, or load the network with channels={shape[1]}"
    return f"{found}: give a tensor of four axes"
