"""Learned position embeddings, resampled to any grid of patches (paper section 3.1).

The reference calls `interpolate` with a *scale factor* of (grid + 0.1) / training grid. The 0.1
keeps rounding from yielding one patch too few, but also shifts the sampled coordinates: output i of
14 -> 6 reads .6475, 2.9426, ... instead of .6667, 3, ... The released weights were trained with
that shift, hence flavours, all bicubic:

- ``reference``: with the offset, equal to the published code to the last digits; DINOv2's networks
  without registers were released with it too;
- ``exact``: the size itself; aligned, and the better choice for a new network;
- ``antialias``: the size itself, antialiased where the grid becomes smaller (and with a = -0.5, not
  -0.75, as PyTorch's antialiased filter): timm, and DINOv2's networks with registers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Position = Literal["reference", "exact", "antialias"]


def resample(
    patches: Float[Tensor, "1 N D"],
    trained: tuple[int, int],
    grid: tuple[int, int],
    flavour: Position,
) -> Float[Tensor, "1 M D"]:
    """Position embeddings of the patches for another grid.

    Args:
        patches: embeddings of the `trained` grid, row by row, without the CLS position.
        trained: (height, width) in patches for which `patches` was learned.
        grid: (height, width) in patches of the result.
        flavour: ``reference``, ``exact`` or ``antialias``, see above.

    Returns:
        Embeddings of `grid`, row by row; `patches` itself if `grid` is `trained`. As in the
        published code, another grid of the same number of patches is resampled.
    """
    if grid == trained:
        return patches
    (height, width), (rows, columns) = trained, grid
    image = patches.unflatten(1, trained).permute(0, 3, 1, 2)  # [1, D, height, width]
    if flavour == "reference":
        scale = ((rows + 0.1) / height, (columns + 0.1) / width)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=flavour == "antialias")
    assert image.shape[-2:] == grid
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def resample_with_cls(
    positions: Float[Tensor, "1 N D"],
    trained: tuple[int, int],
    grid: tuple[int, int],
    flavour: Position,
) -> Float[Tensor, "1 M D"]:
    """`resample` for embeddings that begin with that of the CLS token, which does not change."""
    patches = resample(positions[:, 1:], trained, grid, flavour)
    return torch.cat([positions[:, :1], patches], dim=1)
