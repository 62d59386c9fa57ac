"""Patch features of the images of a source, each resized to complete patches.

Shapes: C channels, H W pixels, D embed_dim, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture, as_pixels
from dino.data.images.image_errors import ImageError, count_defects
from dino.data.images.preprocessing import LONGEST
from dino.data.sources.base import Source, warn
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import memory_errors


class PatchMap(NamedTuple):
    """An image and its patch features.

    Attributes:
        picture: the image as the network sees it, of H x W pixels.
        tokens: one for each patch, which together cover the picture.
    """

    picture: Image.Image
    tokens: Float[Tensor, "D h w"]


class PatchMaps:
    """The patch features of a source's images, one image at a time.

    The features of an image do not depend on the other images. Ratios of sides are kept, to the
    nearest patch and at most 8.

    Args:
        backbone: the network, in evaluation mode.
        source: images of the pixels that it takes.
        size: of an image's shorter side in pixels.
        block: whose tokens are taken, negative from the end.
        advance: called with 1 when an image has been used or skipped.

    Attributes:
        skipped: the images that could not be read, by their index.

    Raises:
        UserError: if there is no such block, or no patch fits.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: Source,
        size: int,
        block: int = -1,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        depth = backbone.depth or 1
        if not -depth <= block < depth:
            raise UserError(f"there is no block {block}: the features of {depth} can be shown")
        if size < (patch := backbone.patch_size or 1):
            raise UserError(f"--size {size} holds no patch of {patch} px")
        self.backbone, self.source, self.size, self.advance = backbone, source, size, advance
        self.block = block % depth
        self.skipped: dict[int, ImageError] = {}
        self._kept: dict[int, PatchMap] = {}

    def keep(self, indices: Sequence[int]) -> list[PatchMap]:
        """The maps of some images, which are kept in memory until `read` returns them.

        Raises:
            UserError: if none of the images can be read.
        """
        found = {index: one for index in indices if (one := self.read(index))}
        self.check_usable(len(indices))
        self._kept |= found
        return [*found.values()]

    def read(self, index: int) -> PatchMap | None:
        """The map of an image; None for one that cannot be read, which is added to `skipped`.

        Raises:
            UserError: if features are not finite, or the memory does not suffice.
        """
        if index in self._kept or index in self.skipped:
            return self._kept.pop(index, None)
        self.advance(1)
        try:
            sample = self.source[index]
        except ImageError as error:
            self.skipped[index] = error
            return None
        picture, images = prepared(self.backbone, sample, self.size)
        with memory_errors("--size"), torch.inference_mode():
            last = (self.backbone.depth or 1) - self.block
            tokens = self.backbone.features(images[None], last=last).patches[0, 0].float()
        if not tokens.isfinite().all():
            raise UserError("the features hold NaN or infinity: the network has diverged")
        return PatchMap(picture, tokens)

    def check_usable(self, count: int | None = None) -> None:
        """Raise `UserError` if none of the images read until now, `count` or all, can be used."""
        count = len(self.source) if count is None else count
        if len(self.skipped) >= count:
            error = next(iter(self.skipped.values()))
            raise UserError(f"none of {count:,} images can be used, the first because {error}")

    def warn_skipped(self) -> None:
        """One sentence on stderr about the images that could not be read, if there are any."""
        if errors := list(self.skipped.values()):
            defects = count_defects(error.defect for error in errors)
            warn(
                f"{len(errors):,} of {len(self.source):,} images could not be used and were left "
                f"out ({defects}), the first: {errors[0]}"
            )


def prepared(
    backbone: Backbone, sample: Sample, size: int
) -> tuple[Image.Image, Float[Tensor, "C H W"]]:
    """An image resized to complete patches, as a picture and as the network's input."""
    pixels, patch = as_pixels(sample), backbone.patch_size or 1
    shorter = min(pixels.shape[1:])
    sides = [
        max(1, round(size * min(side / shorter, LONGEST) / patch)) * patch
        for side in pixels.shape[1:]
    ]
    pixels = F.interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0]
    transform, device = backbone.preprocessing, next(backbone.parameters()).device
    return as_picture(pixels), normalize(pixels.to(device), transform.mean, transform.std)
