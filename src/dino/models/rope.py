"""Rotary positions (RoPE, arXiv 2104.09864) for a grid of patches, as in DINOv3 (arXiv 2508.10104).

Queries and keys of patches are rotated by angles that depend on their place, so that the product of
two depends on where the patches lie to each other. Nothing is learned and any grid is served: the
coordinates of patches are those of their centres, from -1 to 1 along both sides of the image. CLS
and registers have no place and stay as they are.

A head of d channels is d / 2 pairs (i, i + d / 2): a quarter of its channels times two turn with
the row, the others with the column, at the frequencies 1 / period of `Rope.periods`.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.files import UserError

PositionEncoding = Literal["reference", "exact", "antialias", "rope"]
"""How a network knows where a patch lies: a learned embedding, resampled in one of the ways of
`position_embedding`, or rotations."""

RopeTable: TypeAlias = tuple[Tensor, ...]
"""Cosines and sines [T, d] of every token's rotation; 1 and 0 for tokens without a place."""

BASE = 100.0
"""Ratio of the periods of neighbouring frequencies, to the power of d / 4; DINOv3's."""


class Rope(nn.Module):
    """The rotations of all tokens of a grid.

    Args:
        dim: d, the channels of a head; a multiple of 4.

    Attributes:
        periods: [d / 4], in units of half an image's side; kept with the weights, as in DINOv3.

    Raises:
        UserError: if d is no multiple of 4.
    """

    periods: Float[Tensor, " d/4"]

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise UserError(
                f"rotary positions need heads of a multiple of 4 channels, not {dim}: change "
                "embed_dim or heads"
            )
        self.register_buffer("periods", periods(dim))

    def has_usual_periods(self) -> bool:
        """Whether other libraries, which keep no periods, would compute these."""
        usual = periods(4 * len(self.periods)).to(self.periods)
        return torch.allclose(self.periods, usual, rtol=1e-6)

    def forward(self, grid: tuple[int, int], prefix: int) -> RopeTable:
        """Cosines and sines for `prefix` tokens without a place, then the patches row by row."""
        centres = [
            2 * torch.arange(0.5, side, device=self.periods.device) / side - 1 for side in grid
        ]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
        turns = places[:, :, None] / self.periods  # [h w, 2, d / 4]
        angles = 2 * math.pi * turns.flatten(1).tile(2)  # [h w, d]
        angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])
        return angles.cos(), angles.sin()


def periods(dim: int, base: float = BASE) -> Float[Tensor, " d/4"]:
    """DINOv3's periods for heads of d channels: `base` to the powers 0, 4 / d, 8 / d, ... < 1."""
    return base ** (torch.arange(dim // 4, dtype=torch.float32) * (4 / dim))


def rotate(x: Float[Tensor, "B heads T d"], rope: RopeTable) -> Float[Tensor, "B heads T d"]:
    """Turn each pair of channels (i, i + d / 2) of each token by its angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
