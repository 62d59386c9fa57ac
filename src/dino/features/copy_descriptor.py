"""The descriptor of copies of images, and its whitening (paper section 4.2.1, Table 4).

Shapes: n images, B batch, C channels, H W pixels, h w patches, D width, N = 2 D.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dino.features.extractor import Descriptor
from dino.features.raw_pixels import SquareResize
from dino.features.whitening import Covariance, Whitening
from dino.files import UserError
from dino.models.backbone import Backbone

POWER = 4.0
"""The exponent of GeM in the published code."""

RIDGE = 0.1
"""Of the whitening that is learned from a user's folder, see `Whitening.learn`."""

FEWEST = 16
"""Whitening is learned from at least this many images."""


def gem(maps: Float[Tensor, "B D h w"], power: float = POWER) -> Float[Tensor, "B D"]:
    """Generalised mean over the patches (Radenovic et al. 2018).

    As in the published code values below 1e-6, about half of a ViT's, are raised to 1e-6.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bfloat16 has no such powers
    return maps.clamp(min=1e-6).pow(power).mean(dim=(2, 3)).pow(1 / power)


def cls_gem(backbone: Backbone, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """The CLS token and the GeM of the patch tokens after the final norm, concatenated.

    Of convnets the pooled feature and the GeM of the last map.
    """
    last = backbone.features(images)
    return torch.cat([last.cls[-1], gem(last.patches[-1])], dim=1)


def descriptor(backbone: Backbone, size: int | None = None) -> Descriptor:
    """The descriptor of copies, of images resized to `size` x `size` pixels.

    The default is that of Table 4: 320 for patches of 8 pixels, else 224.
    """
    transform = backbone.preprocessing
    default = 320 if backbone.patch_size == 8 else 224
    resize = SquareResize(size or default, transform.mean, transform.std)
    return Descriptor("cls-gem", resize, cls_gem, {"p": POWER})


def learned_whitening(
    features: Tensor, covariance: Covariance, ridge: float | None = None
) -> Whitening:
    """`Whitening.learn`; raises `UserError` for fewer than `FEWEST` images."""
    if len(features) < FEWEST:
        raise UserError(
            f"whitening cannot be learned from {len(features)} images: give --whiten-with a folder "
            f"of {FEWEST} or more, better thousands"
        )
    return Whitening.learn(features, covariance, ridge)
