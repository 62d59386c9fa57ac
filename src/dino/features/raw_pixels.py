"""Raw pixels as features: what a network has to beat.

Shapes: n images, C channels, S pixels a side, N = C S S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import as_pixels, crop_resize
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.sources.open import Source
from dino.data.views.photometric import normalize
from dino.features.extractor import FeatureExtractor
from dino.features.table import FeatureTable


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
