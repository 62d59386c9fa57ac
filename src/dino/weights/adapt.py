"""Weights for a network of another input: its number of channels, its grid of patches.

Nothing else can be converted: patch size, width and depth must agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone
from dino.models.convnet import Timm
from dino.models.position_embedding import Position, resample


def adapt_state_dict(
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
    first = first_layer(backbone)
    if first in fit and fit[first].ndim == own[first].ndim == 4:
        channels = own[first].shape[1]
        if fit[first].shape[1] != channels:
            fit[first] = inflate(fit[first], channels)
    grid = getattr(backbone, "grid", None)
    if grid is not None and "pos_embed" in fit and fit["pos_embed"].ndim == 3:
        fit["pos_embed"] = regrid(fit["pos_embed"], grid, position)
    return fit


def regrid(
    positions: Float[Tensor, "1 N D"], grid: tuple[int, int], position: Position
) -> Float[Tensor, "1 M D"]:
    """A position embedding, CLS first, of a square grid for another grid of patches."""
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or (side, side) == grid:
        return positions
    patches = resample(positions[:, 1:].float(), (side, side), grid, position)
    return torch.cat([positions[:, :1].float(), patches], dim=1)


def first_layer(backbone: Backbone) -> str:
    """The name of the weights that images enter through."""
    if isinstance(backbone, Timm):
        settings: Any = backbone.network.pretrained_cfg
        return f"network.{settings['first_conv']}.weight"
    convnet = backbone.spec["arch"] == "resnet50"
    return "network.conv1.weight" if convnet else "patch_embed.proj.weight"


# ------------------------------------------------------------------------------------ channels
def inflate(weight: Tensor, channels: int) -> Tensor:
    """First-layer weights [D, c, p, p] of c channels for another number of channels.

    The sum over channels is kept, so that an image whose channels are all equal gives the same
    output: the weights are repeated channel by channel, cyclically, and scaled by c / `channels`;
    for one channel they are summed. Uneven repetition is made up for, by scaling to the old sum.
    """
    old = weight.shape[1]
    total = weight.sum(dim=1, keepdim=True)
    if channels == 1:
        return total
    repeated = weight[:, [index % old for index in range(channels)]] * (old / channels)
    missing = total - repeated.sum(dim=1, keepdim=True)
    return repeated + missing / channels


def channel_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or deviations for another number of channels, as `inflate` treats weights."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[index % len(values)] for index in range(channels))


def for_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """The transform for images of other channels: statistics repeated, full range of values."""
    return replace(
        preprocessing,
        mean=channel_statistics(preprocessing.mean, channels),
        std=channel_statistics(preprocessing.std, channels),
        pixels=replace(preprocessing.pixels, channels=channels, low=None, high=None),
    )
