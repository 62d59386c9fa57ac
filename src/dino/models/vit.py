"""The Vision Transformer of the paper (section 3.1, Table 1): DeiT's, pre-norm, with a CLS token.

State-dict keys are the published ones. Two computations differ, with equal results: of the last
block only the CLS token is read, so it needs one query, one projection and one MLP row an image,
and neither keys nor values; and attention is PyTorch's fused kernel, except in the block whose
matrix is requested.

Shapes: B batch, T tokens (CLS first), D embed_dim, h w the grid of patches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features
from dino.models.convnet import laid_out, resnet10t
from dino.models.cpu_linear import Linear
from dino.models.position_embedding import Position, resample, resample_with_cls

Stem = Literal["patch", "conv", "resnet"]
"""What turns pixels into tokens: the paper's linear layer; 3x3 convolutions of stride 2, each twice
as wide (arXiv 2106.14881, section 4); or the stages of a ResNet-10 up to the patch size, as in the
hybrids of the ViT paper (arXiv 2010.11929, section 3.1)."""


class Attention(nn.Module):
    """Multi-head self-attention, scale (D / heads) ** -0.5."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        # [B, T, 3 D] -> queries, keys, values [B, heads, T, D / heads]. The gradients of chunks are
        # concatenated in one pass, those of an unbound permutation in two.
        return tuple(
            rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in x.chunk(3, dim=2)
        )

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Self-attention."""
        q, k, v = self._split(self.qkv(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _by_head(self) -> tuple[Float[Tensor, "3 heads d D"], Float[Tensor, "3 heads 1 d"]]:
        """Weights and biases of queries, keys and values."""
        weights = self.qkv.weight.unflatten(0, (3, self.heads, -1))
        return weights, self.qkv.bias.unflatten(0, (3, self.heads, 1, -1))

    def _queries(self, tokens: Float[Tensor, "n D"]) -> Float[Tensor, "n heads D"]:
        """Vectors whose products with all tokens are the logits of these tokens' attention.

        q . (W x + b) = (W' q) . x + q . b, whose last term cancels in the softmax: only the queries
        are multiplied by W, and no token needs a key.
        """
        weights, bias = self._by_head()
        q = tokens @ weights[0].transpose(1, 2) + bias[0]  # [heads, n, d]
        return (q @ weights[1] * q.shape[-1] ** -0.5).transpose(0, 1)

    def first(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 D"]:
        """Row 0 of `forward`, from one query and without keys or values.

        The mean of W x + b is W mean(x) + b: only the `heads` mean tokens are multiplied by W.
        """
        attention = (self._queries(x[:, 0]) @ x.transpose(1, 2)).softmax(dim=-1)  # [B, heads, T]
        weights, bias = self._by_head()
        mean = (attention @ x).transpose(0, 1)  # [heads, B, D]
        mixed = mean @ weights[2].transpose(1, 2) + bias[2]  # [heads, B, d]
        return self.proj(mixed.transpose(0, 1).flatten(1)[:, None])

    def rows(
        self, x: Float[Tensor, "B T D"], queries: Sequence[int]
    ) -> Float[Tensor, "B heads Q T"]:
        """Some rows of the attention matrix, after the softmax, without keys or other rows."""
        count = len(queries)
        vectors = self._queries(x[:, list(queries)].flatten(0, 1)).unflatten(0, (-1, count))
        logits = vectors.flatten(1, 2) @ x.transpose(1, 2)  # [B, Q heads, T]
        return logits.softmax(dim=-1).unflatten(1, (count, -1)).transpose(1, 2)

    def explicit(
        self, x: Tensor
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B heads T T"], Float[Tensor, "B heads T d"]]:
        """`forward` together with its attention matrix, after the softmax, and its keys."""
        q, k, v = self._split(self.qkv(x))
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention, k


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=Linear(dim, hidden), gelu=nn.GELU(), fc2=Linear(hidden, dim))
        )

    def forward(
        self, x: Tensor, scale: Float[Tensor, "2 B"] | None = None, first: bool = False
    ) -> Tensor:
        """All tokens or the first; `scale` holds the drop-path factors of both branches."""
        attention = self.attn.first if first else self.attn
        x = _residual(x[:, :1] if first else x, attention(self.norm1(x)), scale, 0)
        return _residual(x, self.mlp(self.norm2(x)), scale, 1)

    def explicit(
        self, x: Tensor
    ) -> tuple[Tensor, Float[Tensor, "B heads T T"], Float[Tensor, "B heads T d"]]:
        """All tokens, the attention matrix and its keys."""
        mixed, attention, keys = self.attn.explicit(self.norm1(x))
        x = x + mixed
        return x + self.mlp(self.norm2(x)), attention, keys


def _residual(x: Tensor, branch: Tensor, scale: Tensor | None, row: int) -> Tensor:
    """Residual sum; drop path is one fused multiply-add on it."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale[row, :, None, None])


class ViT(Backbone):
    """A Vision Transformer for images of any height and width.

    Args:
        patch_size: pixels a side of a patch.
        embed_dim: D.
        depth: number of blocks.
        heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden size of the MLP over D.
        image_size: pixels a side of the images whose grid the position embedding is learned for.
        channels: C.
        position: how the position embedding is resampled to other grids, see `position_embedding`.
        norm_eps: epsilon of every layer norm (published code: 1e-6, transformers: 1e-12).
        stem: what turns pixels into tokens, `STEMS`; timm and transformers know "patch" only.
        preprocessing: the transform of the weights; by default the paper's for `image_size`.

    Raises:
        UserError: if `heads` does not divide `embed_dim`, no patch fits into the image, or the stem
            does not make patches of this size.
    """

    has_drop_path = True
    patch_size: int
    position: Position

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        channels: int = 3,
        position: Position = "reference",
        norm_eps: float = 1e-6,
        stem: Stem = "patch",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise UserError(
                f"embed_dim {embed_dim} is not a multiple of heads {heads}: change one of them"
            )
        if image_size < patch_size:
            raise UserError(f"an image of {image_size} px holds no patch of {patch_size} px")
        side = image_size // patch_size
        self.embed_dim, self.patch_size, self.position = embed_dim, patch_size, position
        self.heads, self.depth, self.mlp_ratio = heads, depth, mlp_ratio
        self.grid, self.channels = (side, side), channels
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.stem = stem
        self.patch_embed = _patch_embed(stem, channels, embed_dim, patch_size)
        convolutions = (name for name, x in self.patch_embed.named_parameters() if x.ndim == 4)
        self.first_layer = f"patch_embed.{next(convolutions)}"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, heads, mlp_ratio, norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of std .02 (cut at absolute +-2), zero biases; norms at identity."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif module is self.patch_embed.proj:
                cast(nn.Conv2d, module).reset_parameters()

    def tokens(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, 1 + h*w, D] that enter the first block, and the grid (h, w)."""
        self.check_images(images)
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise UserError(f"images of {height}x{width} px hold no patch of {self.patch_size} px")
        if self.stem != "patch":  # pixels that fill no patch are cropped, as the linear layer does
            rows, columns = height % self.patch_size, width % self.patch_size
            images = laid_out(images[..., : height - rows, : width - columns])
        patches = self.patch_embed(images).permute(0, 2, 3, 1)  # [B, h, w, D]
        grid = (patches.shape[1], patches.shape[2])
        positions = resample(self.pos_embed[:, 1:], self.grid, grid, self.position)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        return torch.cat([first, patches.flatten(1, 2) + positions], dim=1), grid

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        drop_path_scale: Float[Tensor, "branches B"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """The CLS token after the final norm; see `Backbone.forward`."""
        x, _ = self.tokens(images)
        scales = [None] * self.depth if drop_path_scale is None else drop_path_scale.split(2)
        *earlier, last = cast(list[Block], list(self.blocks))
        for block, scale in zip(earlier, scales[:-1], strict=True):
            x = block(x, scale)
        return self.norm(last(x, scales[-1], first=True)).squeeze(1)

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """Tokens of the last blocks through the final norm; see `Backbone.features`."""
        if not 1 <= last <= self.depth:
            raise UserError(f"last must lie between 1 and the {self.depth} blocks, not {last}")
        explicit = self._block(-1 if attention is True else attention)
        x, grid = self.tokens(images)
        matrix, keys, outputs = None, None, []
        for index, block in enumerate(cast(list[Block], list(self.blocks))):
            if attention is not False and index == explicit:
                x, matrix, keys = block.explicit(x)
            else:
                x = block(x)
            if index >= self.depth - last:
                outputs.append(self.norm(x))
        stacked = torch.stack(outputs)  # [last, B, T, D]
        patches = stacked[:, :, 1:].transpose(2, 3).unflatten(3, grid)
        return Features(stacked[:, :, 0], patches, matrix, keys)

    def first_blocks(self, count: int) -> ViT:
        """See `Backbone.first_blocks`."""
        if not 1 <= count <= self.depth:
            raise UserError(f"there is no block {count}: the network has 1 to {self.depth}")
        shorter = copy(self)
        shorter.depth = count
        shorter._modules = {**self._modules, "blocks": self.blocks[:count]}
        return shorter

    def attention_rows(
        self, images: Float[Tensor, "B C H W"], queries: Sequence[int], block: int = -1
    ) -> Float[Tensor, "B heads Q T"]:
        """See `Backbone.attention_rows`; no later block is computed."""
        blocks = cast(list[Block], list(self.blocks))[: self._block(block) + 1]
        x, _ = self.tokens(images)
        for earlier in blocks[:-1]:
            x = earlier(x)
        return blocks[-1].attn.rows(blocks[-1].norm1(x), queries)

    def _block(self, index: int) -> int:
        """The index of a block from 0, from one that may be negative."""
        if not -self.depth <= index < self.depth:
            raise UserError(f"there is no block {index}: the network has {self.depth}")
        return index % self.depth

    def describe(self) -> dict[str, str]:
        """See `Backbone.describe`."""
        return {
            "feature": f"{self.embed_dim} numbers, the CLS token after the final norm",
            "patch": f"{self.patch_size} px",
            "grid": f"{self.grid[0]} x {self.grid[1]} patches",
            "blocks": f"{self.depth}, of {self.heads} heads",
        }

    def layer_index(self, name: str) -> int:
        """See `Backbone.layer_index`."""
        module, *rest = name.split(".")
        if module == "blocks":
            return 1 + int(rest[0])
        return self.depth + 1 if module == "norm" else 0

    def resize_positions(self, tensors: dict[str, Tensor], position: Position) -> dict[str, Tensor]:
        """See `Backbone.resize_positions`; embeddings of no square grid stay as they are."""
        old = tensors.get("pos_embed")
        if old is None or old.ndim != 3:
            return tensors
        side = math.isqrt(old.shape[1] - 1)
        if side * side != old.shape[1] - 1 or (side, side) == self.grid:
            return tensors
        resized = resample_with_cls(old.float(), (side, side), self.grid, position)
        return {**tensors, "pos_embed": resized}

    def fix_size(self, height: int, width: int) -> None:
        """See `Backbone.fix_size`."""
        grid = (height // self.patch_size, width // self.patch_size)
        if min(grid) == 0:
            size = f"images of {height}x{width} px"
            raise UserError(f"{size} hold no patch of {self.patch_size} px: give a larger --size")
        positions = resample_with_cls(self.pos_embed, self.grid, grid, self.position)
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid
        if grid[0] == grid[1]:  # the sizes that `dino.create` can build
            self.spec = {**self.spec, "image_size": height}

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`; the norms must have timm's epsilon."""
        self._check_layout("timm")
        if self.norm.eps != 1e-6:
            raise UserError(
                f"timm's ViTs have the norm epsilon 1e-06, this one has {self.norm.eps}: use "
                "--format transformers or onnx"
            )
        arch = self.spec["arch"]
        patch = 8 if self.patch_size == 8 and arch != "vit_tiny" else 16  # those timm has
        return f"{arch}_patch{patch}_224", {
            "img_size": size,
            "patch_size": self.patch_size,
            "in_chans": self.channels,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
        }

    def _check_layout(self, library: str) -> None:
        if self.stem != "patch":
            raise UserError(f"{library} has no ViT with this stem of convolutions: use onnx")

    def transformers_config(self, size: int) -> dict[str, Any]:
        """See `Backbone.transformers_config`; with convolutions there is no such network."""
        self._check_layout("transformers")
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "intermediate_size": int(self.embed_dim * self.mlp_ratio),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": self.norm.eps,
            "image_size": size,
            "patch_size": self.patch_size,
            "num_channels": self.channels,
            "qkv_bias": True,
            "pooler_output_size": self.embed_dim,
            "pooler_act": "linear",
            "torch_dtype": "float32",
        }


def _patch_embed(stem: Stem, channels: int, embed_dim: int, patch_size: int) -> nn.Sequential:
    """The layers of a stem; the last, `proj`, has the bias and PyTorch's init, as in DeiT."""
    layers: dict[str, nn.Module] = {}
    inputs, stride = channels, patch_size
    if stem == "conv":
        count = patch_size.bit_length() - 1
        if patch_size != 2**count or embed_dim % patch_size:
            raise UserError(
                f"a stem of convolutions halves the image again and again: patch size {patch_size} "
                f"must be a power of 2 that divides embed_dim {embed_dim}"
            )
        for index in range(count):
            width = embed_dim >> (count - 1 - index)
            layers[f"conv{index + 1}"] = nn.Conv2d(inputs, width, 3, 2, padding=1, bias=False)
            layers[f"bn{index + 1}"] = nn.BatchNorm2d(width)
            layers[f"relu{index + 1}"] = nn.ReLU(inplace=True)
            inputs = width
        stride = 1
    elif stem == "resnet":
        stages = {4: 1, 8: 2, 16: 3, 32: 4}
        if patch_size not in stages:
            raise UserError(
                f"a stem of ResNet-10 makes patches of {', '.join(map(str, stages))} px"
            )
        names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
        network = resnet10t(channels)
        layers = {name: getattr(network, name) for name in names[: 4 + stages[patch_size]]}
        inputs, stride = 64 * patch_size // 4, 1
    layers["proj"] = nn.Conv2d(inputs, embed_dim, stride, stride=stride)
    return nn.Sequential(OrderedDict(layers))


def init_linear(layer: nn.Linear) -> None:
    """The published init of every Linear: normal of std .02 (cut at absolute +-2), bias 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "heads": 12},
}
"""Table 1, and ViT-Ti of the published code."""
