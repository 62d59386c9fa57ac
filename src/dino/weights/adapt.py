"""Weights for a network of another input: its number of channels, its grid of patches.

Nothing else can be converted: patch size, embed_dim and depth must agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dino.models.backbone import Backbone
from dino.models.position_embedding import Position
from dino.weights.infer_spec import inflate


def fitted(
    tensors: Mapping[str, Tensor], backbone: Backbone, position: Position
) -> dict[str, Tensor]:
    """A state dict of the same architecture for other channels or another grid, fit for `backbone`.

    Args:
        tensors: under our names; what fits stays as it is, bit for bit.
        backbone: the network that they are for.
        position: how the network they are of resamples its position embedding. Converted in that
            way, the new network computes for images of its size just what the old one did.

    Returns:
        The tensors, to be loaded strictly.
    """
    fit, own = dict(tensors), backbone.state_dict()
    first = backbone.first_layer
    if first in fit and fit[first].ndim == own[first].ndim == 4:
        channels = own[first].shape[1]
        if fit[first].shape[1] != channels:
            fit[first] = inflate(fit[first], channels)
    return backbone.resize_positions(fit, position)
