"""The images in which a report shows attention, components and similarity, and their pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.images.decode import Sample, as_picture
from dino.data.images.image_errors import ImageError
from dino.data.images.patch_grid import patch_input, shorter_side
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.files import UserError
from dino.models.backbone import Backbone

PHOTOGRAPHS, SIDE, CELLS = 4, 480, 60
"""Number of photographs with maps; their longer side in pixels, and at most in patches."""

OBJECTS = ("astronaut", "chelsea", "china", "coffee")
"""Photographs of the demo that show objects."""

Networks: TypeAlias = Mapping[str, Backbone]
"""Networks by what they are called on the page, the first one first."""


class Photograph(NamedTuple):
    """An image with its name."""

    name: str
    sample: Sample

    @property
    def picture(self) -> Image.Image:
        """The image, its longer side at most `SIDE` pixels."""
        full = as_picture(self.sample)
        return ImageOps.contain(full, (SIDE, SIDE)) if max(full.size) > SIDE else full

    def for_network(self, network: Backbone) -> Float[Tensor, "1 C _ _"]:
        """The input of a network, resized to complete patches; nothing is cropped."""
        patch, device = network.patch_size or 1, next(network.parameters()).device
        width, height = as_picture(self.sample).size
        longest = min(SIDE, CELLS * patch) if network.patch_size else SIDE
        size = max(patch, shorter_side(height, width, longest))
        return patch_input(self.sample, size, patch, True, network.preprocessing, device)


@torch.inference_mode()
def computed(
    networks: Networks, compute: Callable[[Backbone], Sequence[Tensor]]
) -> dict[str, Sequence[Tensor]]:
    """What `compute` returns for each network, by their names.

    Raises:
        UserError: if it is not finite.
    """
    found = {name: compute(network) for name, network in networks.items()}
    for name, tensors in found.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(f"the features ({name}) hold NaN or infinity: the network has diverged")
    return found


def photographs(
    data: str, val: str | None, pixels: PixelFormat = RGB
) -> tuple[list[Photograph], str]:
    """A few photographs with their names, and a sentence on whether they were trained on.

    Args:
        data: the images that were trained on.
        val: others, to be taken instead.
        pixels: channels and range of both.

    Raises:
        UserError: if the data do not exist any more.
    """
    if data == "demo":
        from dino.data.sources.demo import photographs as demo_photographs

        named = demo_photographs()
        origin = "The left of each photograph was trained on, in tiles; the right part was not."
        return [Photograph(name, named[name]) for name in OBJECTS], origin
    folder = data if val is None else val
    source = open_source(folder, pixels)
    images = usable(source, spread(len(source), PHOTOGRAPHS))
    found = [Photograph(image_name(source, index, folder), one) for index, one in images.items()]
    return found, "These images were " + ("trained on." if val is None else "not trained on.")


def usable(
    source: Source, indices: Sequence[int], keep: Callable[[Sample], Any] = lambda sample: sample
) -> dict[int, Any]:
    """What is kept of the readable images, by index; the run has listed the others."""
    images = {}
    for index in indices:
        with suppress(ImageError):
            images[index] = keep(source[index])
    return images


def image_name(source: Source, index: int, data: str) -> str:
    """An image's name without the folder of all images, and its class unless that is in it."""
    path, label = source.path(index), source.class_name(index)
    folder = data if path.startswith(data) else data.partition(":")[0]  # demo of demo:test
    name = path.removeprefix(folder).lstrip("/\\:") or path
    return name if not label or label in name.split("/") else f"{name} ({label})"
