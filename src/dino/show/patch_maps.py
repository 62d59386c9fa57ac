"""Patch features of images, each resized to complete patches.

Shapes: C channels, H W pixels, D embed_dim, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture
from dino.data.images.image_errors import ImageError, left_out
from dino.data.images.patch_grid import patch_input
from dino.data.sources.base import warn
from dino.data.sources.named_inputs import NamedInput
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import memory_errors


class PatchMap(NamedTuple):
    """An image and its patch features.

    Attributes:
        picture: the image at its own size.
        tokens: one for each patch, which together cover the picture.
    """

    picture: Image.Image
    tokens: Float[Tensor, "D h w"]


class PatchMaps:
    """The patch features of images, one image at a time.

    The features of an image do not depend on the other images. Ratios of sides are kept, to the
    nearest patch and at most 8.

    Args:
        backbone: the network, in evaluation mode.
        inputs: images of the pixels that it takes, no videos.
        size: of an image's shorter side in pixels.
        block: whose tokens are taken, negative from the end.
        advance: called with 1 when an image has been used or skipped.

    Attributes:
        skipped: the images that could not be read, by their index.

    Raises:
        UserError: if there is no such block, or an input is a video.
    """

    def __init__(
        self,
        backbone: Backbone,
        inputs: Sequence[NamedInput],
        size: int,
        block: int = -1,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        depth = backbone.depth or 1
        if not -depth <= block < depth:
            raise UserError(f"there is no block {block}: the features of {depth} can be shown")
        if videos := [one.path for one in inputs if one.source is None]:
            raise UserError(f"{videos[0]} is a video: save some of its frames as images")
        self.backbone, self.inputs, self.size, self.advance = backbone, inputs, size, advance
        self.block = block % depth
        self.skipped: dict[int, ImageError] = {}
        self._cached: dict[int, PatchMap] = {}

    def cache(self, indices: Sequence[int]) -> list[PatchMap]:
        """The maps of some images, which stay in memory until `read` returns them.

        Raises:
            UserError: if none of the images can be read.
        """
        found = {index: one for index in indices if (one := self.read(index))}
        self.check_usable(len(indices))
        self._cached |= found
        return [*found.values()]

    def read(self, index: int) -> PatchMap | None:
        """The map of an image; None for one that cannot be read, which is added to `skipped`.

        Raises:
            UserError: if no patch fits, features are not finite, or the memory does not suffice.
        """
        if index in self._cached or index in self.skipped:
            return self._cached.pop(index, None)
        self.advance(1)
        try:
            sample = self._sample(index)
        except ImageError as error:
            self.skipped[index] = error
            return None
        tokens = self._tokens(sample)
        if not tokens.isfinite().all():
            raise UserError("the features hold NaN or infinity: the network has diverged")
        return PatchMap(as_picture(sample), tokens)

    def _sample(self, index: int) -> Sample:
        one = self.inputs[index]
        assert one.source is not None
        return one.source[one.index]

    @torch.inference_mode()
    def _tokens(self, sample: Sample) -> Float[Tensor, "D h w"]:
        backbone, transform = self.backbone, self.backbone.preprocessing
        patch, device = backbone.patch_size or 1, next(backbone.parameters()).device
        images = patch_input(sample, self.size, patch, True, transform, device)
        last = (backbone.depth or 1) - self.block
        with memory_errors("--size"):
            return backbone.features(images, last=last).patches[0, 0].float()

    def check_usable(self, count: int | None = None) -> None:
        """Raise `UserError` if none of the images read until now, `count` or all, can be used."""
        count = len(self.inputs) if count is None else count
        if len(self.skipped) >= count:
            error = next(iter(self.skipped.values()))
            raise UserError(f"none of {count:,} images can be used, the first because {error}")

    def warn_skipped(self) -> None:
        """One sentence on stderr about the images that could not be read, if there are any."""
        if errors := list(self.skipped.values()):
            warn(left_out(errors, len(self.inputs)))
