"""Attention maps of the CLS token or of a patch, and masks of their mass (section 4.2.2, Fig. 4).

Shapes: B batch, T tokens (CLS, registers, patches), h w patches, H W pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dino.models.backbone import Backbone


@torch.inference_mode()
def attention_maps(
    backbone: Backbone,
    images: Float[Tensor, "B C H W"],
    block: int = -1,
    query: tuple[int, int] | None = None,
) -> Float[Tensor, "B heads h w"]:
    """The attention of one token to the patches on their grid, after the softmax of all tokens.

    A map sums to less than 1: attention to tokens that are no patches (CLS, registers) is
    left out.

    Args:
        backbone: in evaluation mode.
        images: normalised images.
        block: its index, negative from the end.
        query: row and column of a patch; None for the CLS token.

    Raises:
        UserError: if the network has no CLS attention (convnets), or no such block.
    """
    patch = backbone.patch_size or 1
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    prefix = 1 + backbone.registers
    token = 0 if query is None else prefix + query[0] * grid[1] + query[1]
    rows = backbone.attention_rows(images, [token], block)
    return rows[:, :, 0, prefix:].unflatten(2, grid)


def mass_mask(
    attention: Float[Tensor, "*batch h w"], mass: float = 0.6
) -> Bool[Tensor, "*batch h w"]:
    """The smallest set of patches with a share `mass` (0 to 1) of each non-negative map.

    As in the published code: in ascending order, the patches where the running sum of the
    normalised map exceeds `1 - mass`. Of equal patches the later in the grid are included.
    """
    flat = attention.flatten(-2)
    value, order = flat.sort(dim=-1, stable=True)
    running = (value / value.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(-1, order, running > 1 - mass).view(attention.shape)
