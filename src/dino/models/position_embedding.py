"""Learned position embeddings, resampled to any grid of patches (paper section 3.1; quirks below).

The reference calls `interpolate` with a *scale factor* of (grid + 0.1) / training grid. The 0.1 was
added so that rounding never yields one patch too few, but PyTorch samples with the scale it is
given, so the sampled coordinates shift: output i of 14 -> 6 reads .6475, 2.9426, ... instead of
.6667, 3, ... The released weights were trained with that shift, hence two flavours:

- ``reference``: keeps the offset, equal to the published code to the last digits;
- ``exact``: requests the size itself; aligned, and the better choice for a new network.

Both are bicubic with a = -0.75 and no antialiasing.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Position = Literal["reference", "exact"]


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
        grid: (height, width) in patches that is wanted.
        flavour: ``reference`` or ``exact``, see the module's text.

    Returns:
        Embeddings of `grid`, row by row; `patches` itself where nothing needs resampling. Like the
        published code, ``reference`` resamples a non-square grid even if its count agrees.
    """
    if grid == trained:
        return patches
    (height, width), (rows, columns) = trained, grid
    image = patches.unflatten(1, trained).permute(0, 3, 1, 2)  # [1, D, height, width]
    if flavour == "exact":
        image = F.interpolate(image, size=grid, mode="bicubic")
    else:
        scale = ((rows + 0.1) / height, (columns + 0.1) / width)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    if image.shape[-2:] != grid:
        raise RuntimeError(
            f"resampling {trained} positions gave {tuple(image.shape[-2:])}, not {grid}"
        )
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def resample_with_cls(
    positions: Float[Tensor, "1 N D"],
    trained: tuple[int, int],
    grid: tuple[int, int],
    flavour: Position,
) -> Float[Tensor, "1 M D"]:
    """`resample` for embeddings that begin with that of the CLS token, which stays as it is."""
    patches = resample(positions[:, 1:], trained, grid, flavour)
    return torch.cat([positions[:, :1], patches], dim=1)
