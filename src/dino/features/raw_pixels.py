"""Raw pixels as features: what a network has to beat.

Shapes: n images, C channels, S pixels a side, N = C S S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dino.data.images.decode import as_pixels, crop_resize
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.sources.open import Source
from dino.data.views.photometric import normalize
from dino.features.extractor import FeatureExtractor
from dino.features.table import FeatureTable
from dino.models.backbone import Backbone, Features


@dataclass(frozen=True)
class SquareResize:
    """A transform to `size` x `size` normalised pixels that ignores the aspect ratio."""

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image | Tensor) -> Float[Tensor, "C S S"]:
        """Bicubic, antialiased."""
        raw = as_pixels(image)
        box = (0, 0, raw.shape[1], raw.shape[2])
        return normalize(crop_resize(raw, box, self.size, False), self.mean, self.std)


def raw_pixels(
    source: Source,
    size: int = 32,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    **options: Any,
) -> FeatureTable:
    """Each image resized to size x size, normalised and flattened.

    Normalised as for networks: the cosine similarity of pixels that are all positive depends on
    little but their brightness (k-NN on Imagenette 27 % instead of 37 %, k = 20).
    `**options` are `batch` and `workers` of `FeatureExtractor`.
    """
    transform = SquareResize(size, mean, std)
    extractor = FeatureExtractor(
        transform, lambda images: images.flatten(1), title="raw pixels", **options
    )
    return extractor.table(source)


class RawPixels(Backbone):
    """Raw pixels behind the interface of networks, so that any job can be done with them.

    The feature of an image is that of `raw_pixels`; a patch token is the pixels of its patch.

    Args:
        like: the network whose channels, mean, deviation, patches and device are taken; of networks
            without patches those of 32 pixels.
        size: pixels a side of an image that gets one feature.
    """

    def __init__(self, like: Backbone, size: int = 32) -> None:
        super().__init__()
        transform, device = like.preprocessing, next(like.parameters()).device
        self.preprocessing = replace(transform, resize=size, crop=size, squash=True)
        self.channels, self.patch_size = like.channels, like.patch_size or 32
        self.embed_dim = self.channels * size**2
        self.spec = {"arch": "pixels", "size": size, "channels": self.channels}
        self.device = nn.Parameter(torch.zeros((), device=device), requires_grad=False)

    def forward(
        self, images: Float[Tensor, "B C H W"], drop_path_scale: Tensor | None = None
    ) -> Float[Tensor, "B D"]:
        """The pixels of each image in one row."""
        return images.flatten(1)

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pixels of each image and of each patch; see `Backbone.features`."""
        patches = F.pixel_unshuffle(images, self.patch_size or 1)
        return Features(self(images)[None], patches[None])
