"""Weights for a network of another input: its number of channels, its grid of patches.

Nothing else can be converted: patch size, embed_dim and depth must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone
from dino.models.rope import PositionEncoding


def adapt_state_dict(
    tensors: Mapping[str, Tensor], backbone: Backbone, position: PositionEncoding
) -> dict[str, Tensor]:
    """Convert a state dict of the same architecture for the channels and grid of `backbone`.

    Args:
        tensors: under our names; a tensor of the right shape stays as it is, bit for bit.
        backbone: the target network.
        position: how the source network resamples its position embedding. Converted in that way,
            the target computes for images of its size just what the source did.

    Returns:
        The tensors, to be loaded strictly.
    """
    adapted, target = dict(tensors), backbone.state_dict()
    first = backbone.first_layer
    if first in adapted and adapted[first].ndim == target[first].ndim == 4:
        adapted[first] = inflate(adapted[first], target[first].shape[1])
    return backbone.resize_positions(adapted, position)


# ------------------------------------------------------------------------------------ channels
def inflate(weight: Tensor, channels: int) -> Tensor:
    """First-layer weights [D, c, p, p] of c channels for another number of channels.

    The sum over channels stays the same, so that an image whose channels are all equal gives the
    same output: the weights are repeated channel by channel, cyclically, and scaled by c /
    `channels`; for one channel they are summed. Uneven repetition is corrected to the old sum.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
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
