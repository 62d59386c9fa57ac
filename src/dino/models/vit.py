"""The Vision Transformer of the paper (section 3.1, Table 1): DeiT's, pre-norm, with a CLS token.

State-dict keys are the published ones. Two things are computed differently, with equal results:
only the CLS token of the last block is ever read, so that block computes one query, one projection
and one MLP row an image, and neither keys nor values; and attention is PyTorch's fused kernel
except in the one block whose matrix was asked for.

Shapes: B batch, T tokens (CLS first), D width, h w the grid of patches.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features
from dino.models.cpu_linear import Linear
from dino.models.position_embedding import Position, resample


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each through one linear map (a convolution with stride p)."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # The published init leaves this layer at PyTorch's default, and so do we.
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """Patch tokens on their grid; rows and columns that fill no patch are left out."""
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention, scale (D / heads) ** -0.5."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        # [B, T, 3 D] -> queries, keys, values [B, heads, T, D / heads]. Chunks: their gradients are
        # joined in one pass, those of an unbound permutation in two.
        return tuple(
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in x.chunk(3, dim=2)
        )

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Every token attends to all tokens."""
        q, k, v = self._split(self.qkv(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def first(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 D"]:
        """Row 0 of `forward`: one query, and keys and values of no token.

        q . (W x + b) = (W' q) . x + q . b, whose last part no softmax sees, and the mean of W x + b
        is W of the mean of x, + b: so the single query and the `heads` mean tokens go through W.
        """
        weights = self.qkv.weight.unflatten(0, (3, self.heads, -1))  # [3, heads, d, D]
        bias = self.qkv.bias.unflatten(0, (3, self.heads, 1, -1))  # [3, heads, 1, d]
        q = x[:, 0] @ weights[0].transpose(1, 2) + bias[0]  # [heads, B, d]
        asked = (q @ weights[1] * q.shape[-1] ** -0.5).transpose(0, 1)  # [B, heads, D]
        attention = (asked @ x.transpose(1, 2)).softmax(dim=-1)  # [B, heads, T]
        mean = (attention @ x).transpose(0, 1)  # [heads, B, D]
        mixed = mean @ weights[2].transpose(1, 2) + bias[2]  # [heads, B, d]
        return self.proj(mixed.transpose(0, 1).flatten(1)[:, None])

    def explicit(self, x: Tensor) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B heads T T"]]:
        """`forward` together with its attention matrix, after the softmax."""
        q, k, v = self._split(self.qkv(x))
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each token alone."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, keep: Float[Tensor, "2 B"] | None = None) -> Tensor:
        """All tokens; `keep` holds this block's two rows of drop-path factors."""
        x = _residual(x, self.attn(self.norm1(x)), keep, 0)
        return _residual(x, self.mlp(self.norm2(x)), keep, 1)

    def first(self, x: Tensor, keep: Float[Tensor, "2 B"] | None = None) -> Tensor:
        """Token 0 of `forward`, [B, 1, D]."""
        x = _residual(x[:, :1], self.attn.first(self.norm1(x)), keep, 0)
        return _residual(x, self.mlp(self.norm2(x)), keep, 1)

    def explicit(self, x: Tensor) -> tuple[Tensor, Float[Tensor, "B heads T T"]]:
        """All tokens, and the attention matrix."""
        mixed, attention = self.attn.explicit(self.norm1(x))
        x = x + mixed
        return x + self.mlp(self.norm2(x)), attention


def _residual(x: Tensor, branch: Tensor, keep: Tensor | None, row: int) -> Tensor:
    """Residual sum; drop path is one fused multiply-add on it."""
    return x + branch if keep is None else torch.addcmul(x, branch, keep[row, :, None, None])


class ViT(Backbone):
    """A Vision Transformer for images of any height and width.

    Args:
        patch_size: pixels a side of a patch.
        width: D.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        mlp_ratio: hidden width of the MLP over D.
        image_size: pixels a side of the images whose grid the position embedding is learned for.
        channels: C.
        position: how the position embedding is resampled to other grids, see `models.position`.
        norm_eps: epsilon of every layer norm; the published 1e-6, unless weights come from a
            library that says otherwise (transformers: 1e-12).
        preprocessing: the transform of the weights; by default the paper's for `image_size`.

    Raises:
        UserError: if `heads` does not divide `width` or no patch fits into the image.
    """

    def __init__(
        self,
        *,
        patch_size: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        channels: int = 3,
        position: Position = "reference",
        norm_eps: float = 1e-6,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not a multiple of heads {heads}: change one of them")
        if image_size < patch_size:
            raise UserError(f"an image of {image_size} px holds no patch of {patch_size} px")
        side = image_size // patch_size
        self.width, self.patch_size, self.position = width, patch_size, position
        self.heads, self.depth = heads, depth
        self.grid = (side, side)
        self.residual_branches = 2 * depth
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.patch_embed = PatchEmbed(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of std .02 (cut at absolute +-2), zero biases; norms at identity."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()

    def tokens(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, 1 + h*w, D] that enter the first block, and the grid (h, w)."""
        if min(images.shape[-2:]) < self.patch_size:  # type: ignore[operator]
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise UserError(f"images of {size} px hold no patch of {self.patch_size} px")
        patches = self.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        positions = resample(self.pos_embed[:, 1:], self.grid, grid, self.position)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        return torch.cat([first, patches.flatten(1, 2) + positions], dim=1), grid

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Float[Tensor, "branches B"] | None = None
    ) -> Float[Tensor, "B D"]:
        """The CLS token after the final norm; see `Backbone.forward`."""
        x, _ = self.tokens(images)
        rows = [None] * self.depth if keep is None else list(keep.unflatten(0, (-1, 2)))
        *earlier, last = cast(list[Block], list(self.blocks))
        for block, row in zip(earlier, rows[:-1], strict=True):
            x = block(x, row)
        cls: Tensor = self.norm(last.first(x, rows[-1])).squeeze(1)
        return cls

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """Tokens of the last blocks through the final norm; see `Backbone.features`."""
        if not 1 <= last <= self.depth:
            raise UserError(f"last must lie between 1 and the {self.depth} blocks, not {last}")
        asked = _block_index(attention, self.depth)
        x, grid = self.tokens(images)
        matrix, outputs = None, []
        for index, block in enumerate(cast(list[Block], list(self.blocks))):
            if index == asked:
                x, matrix = block.explicit(x)
            else:
                x = block(x)
            if index >= self.depth - last:
                outputs.append(self.norm(x))
        stacked = torch.stack(outputs)  # [last, B, T, D]
        patches = stacked[:, :, 1:].transpose(2, 3).unflatten(3, grid)
        return Features(stacked[:, :, 0], patches, matrix)


def _block_index(attention: bool | int, depth: int) -> int | None:
    if attention is False:
        return None
    index = depth - 1 if attention is True else attention
    if not -depth <= index < depth:
        raise UserError(f"there is no block {index}: the network has {depth}")
    return index % depth


def init_linear(layer: nn.Linear) -> None:
    """The published init of every Linear: normal of std .02 (cut at absolute +-2), bias 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
}
"""Table 1, and the code's own ViT-Ti."""
