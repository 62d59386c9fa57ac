"""Weights for a network of another input: its number of channels, its grid of patches.

Nothing else can be converted: patch size, embed_dim and depth must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone
from dino.models.position_embedding import Position


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
    first = backbone.first_layer
    if first in fit and fit[first].ndim == own[first].ndim == 4:
        channels = own[first].shape[1]
        if fit[first].shape[1] != channels:
            fit[first] = inflate(fit[first], channels)
    return backbone.resize_positions(fit, position)


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
