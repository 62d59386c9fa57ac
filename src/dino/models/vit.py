"""The Vision Transformer of the paper (section 3.1, Table 1): DeiT's, pre-norm, with a CLS token.

Its successors are the same network with more parts, each off by default: registers (arXiv
2309.16588), layer scale (arXiv 2103.17239) and SwiGLU (arXiv 2002.05202), which DINOv2 uses (arXiv
2304.07193), rotary positions and keys without a bias, which DINOv3 uses (arXiv 2508.10104).

State-dict keys are the published ones. Two computations differ, with equal results: of the last
block only the CLS token is read, so it needs one query, one projection and one MLP row an image,
no values, and keys for rotary positions only; and attention is PyTorch's fused kernel, except in
the block whose matrix is requested.

Shapes: B batch, T tokens (CLS, registers, patches), D embed_dim, d = D over heads, h w the grid of
patches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features
from dino.models.convnet import laid_out, resnet10t
from dino.models.cpu_linear import Linear, linear
from dino.models.position_embedding import resample, resample_with_cls
from dino.models.rope import BASE, PositionEncoding, Rope, RopeTable, rotate

Stem = Literal["patch", "conv", "resnet"]
"""What turns pixels into tokens: the paper's linear layer; 3x3 convolutions of stride 2, each twice
as wide (arXiv 2106.14881, section 4); or the stages of a ResNet-10 up to the patch size, as in the
hybrids of the ViT paper (arXiv 2010.11929, section 3.1)."""


Mlp = Literal["gelu", "swiglu"]
"""The MLP of a block: two layers with GELU between, or three of which one gates another."""


class LinearWithoutKeyBias(Linear):
    """Queries, keys and values, of which the keys have no bias: its parameter is not used."""

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Input @ weight.T + bias, with zeros in the place of the keys' bias."""
        q, k, v = self.bias.chunk(3)
        return linear(input, self.weight, torch.cat([q, torch.zeros_like(k), v]))


class Attention(nn.Module):
    """Multi-head self-attention, scale (D / heads) ** -0.5.

    Everywhere `rope` holds the rotations of queries and keys; None for none.
    """

    def __init__(self, dim: int, heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = (Linear if key_bias else LinearWithoutKeyBias)(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        # [B, T, 3 D] -> queries, keys, values [B, heads, T, D / heads]. The gradients of chunks are
        # concatenated in one pass, those of an unbound permutation in two.
        return tuple(
            rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in x.chunk(3, dim=2)
        )

    def _qkv(self, x: Tensor, rope: RopeTable | None) -> tuple[Tensor, ...]:
        q, k, v = self._split(self.qkv(x))
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def forward(
        self, x: Float[Tensor, "B T D"], rope: RopeTable | None = None
    ) -> Float[Tensor, "B T D"]:
        """Self-attention."""
        q, k, v = self._qkv(x, rope)
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

    def first(
        self, x: Float[Tensor, "B T D"], rope: RopeTable | None = None
    ) -> Float[Tensor, "B 1 D"]:
        """Row 0 of `forward`, from one query and without values.

        The mean of W x + b is W mean(x) + b: only the `heads` mean tokens are multiplied by W.
        """
        if rope is None:
            attention = (self._queries(x[:, 0]) @ x.transpose(1, 2)).softmax(dim=-1)
        else:
            attention = self._rotated_rows(x, [0], rope).squeeze(2)  # [B, heads, T]
        weights, bias = self._by_head()
        mean = (attention @ x).transpose(0, 1)  # [heads, B, D]
        mixed = mean @ weights[2].transpose(1, 2) + bias[2]  # [heads, B, d]
        return self.proj(mixed.transpose(0, 1).flatten(1)[:, None])

    def rows(
        self, x: Float[Tensor, "B T D"], queries: Sequence[int], rope: RopeTable | None = None
    ) -> Float[Tensor, "B heads Q T"]:
        """Some rows of the attention matrix, after the softmax, without other rows."""
        if rope is not None:
            return self._rotated_rows(x, queries, rope)
        count = len(queries)
        vectors = self._queries(x[:, list(queries)].flatten(0, 1)).unflatten(0, (-1, count))
        logits = vectors.flatten(1, 2) @ x.transpose(1, 2)  # [B, Q heads, T]
        return logits.softmax(dim=-1).unflatten(1, (count, -1)).transpose(1, 2)

    def _rotated_rows(self, x: Tensor, queries: Sequence[int], rope: RopeTable) -> Tensor:
        """`rows` where each key is rotated by its place: it has to be computed."""
        weights, bias = self._by_head()
        chosen = list(queries)
        q = x[:, None, chosen] @ weights[0].transpose(1, 2) + bias[0]  # [B, heads, Q, d]
        k = (x @ weights[1].flatten(0, 1).T).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if not isinstance(self.qkv, LinearWithoutKeyBias):
            k = k + bias[1]
        q, k = rotate(q, tuple(table[..., chosen, :] for table in rope)), rotate(k, rope)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def explicit(
        self, x: Tensor, rope: RopeTable | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B heads T T"], Float[Tensor, "B heads T d"]]:
        """`forward` together with its attention matrix, after the softmax, and its keys."""
        q, k, v = self._qkv(x, rope)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention, k


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), where W1 and W2 are one matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """The gated MLP."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A factor for each channel of a residual branch."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((dim,), start))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a layer scale multiplies both branches.

    Args:
        dim: D.
        heads: attention heads.
        hidden: size of the MLP's hidden layer.
        norm_eps: epsilon of both norms.
        mlp: see `Mlp`.
        layer_scale: its first value; None for none.
        key_bias: whether keys have a bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        norm_eps: float,
        mlp: Mlp = "gelu",
        layer_scale: float | None = None,
        key_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, key_bias)
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden) if mlp == "swiglu" else _gelu_mlp(dim, hidden)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        scale: Float[Tensor, "2 B"] | None = None,
        first: bool = False,
        rope: RopeTable | None = None,
    ) -> Tensor:
        """All tokens or the first; `scale` holds the drop-path factors of both branches."""
        attention = self.attn.first if first else self.attn
        branch = attention(self.norm1(x), rope)
        x = _residual(x[:, :1] if first else x, branch, self.ls1, scale, 0)
        return _residual(x, self.mlp(self.norm2(x)), self.ls2, scale, 1)

    def explicit(
        self, x: Tensor, rope: RopeTable | None = None
    ) -> tuple[Tensor, Float[Tensor, "B heads T T"], Float[Tensor, "B heads T d"]]:
        """All tokens, the attention matrix and its keys."""
        mixed, attention, keys = self.attn.explicit(self.norm1(x), rope)
        x = _residual(x, mixed, self.ls1)
        return _residual(x, self.mlp(self.norm2(x)), self.ls2), attention, keys


def _gelu_mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(fc1=Linear(dim, hidden), gelu=nn.GELU(), fc2=Linear(hidden, dim))
    )


def _residual(
    x: Tensor,
    branch: Tensor,
    layer_scale: LayerScale | None,
    scale: Tensor | None = None,
    row: int = 0,
) -> Tensor:
    """Residual sum; layer scale and drop path are one fused multiply-add on it."""
    if layer_scale is None:
        return x + branch if scale is None else torch.addcmul(x, branch, scale[row, :, None, None])
    gamma = layer_scale.gamma
    factor = gamma if scale is None else scale[row, :, None, None] * gamma
    return torch.addcmul(x, branch, factor)


class ViT(Backbone):
    """A Vision Transformer for images of any height and width.

    Args:
        patch_size: pixels a side of a patch.
        embed_dim: D.
        depth: number of blocks.
        heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden size of the MLP over D (SwiGLU: of each of its two branches).
        image_size: pixels a side of the images whose grid the position embedding is learned for.
        channels: C.
        position: how the position embedding is resampled to other grids, see `position_embedding`;
            rope for rotary positions in its place, see `rope`.
        norm_eps: epsilon of every layer norm (published code: 1e-6, transformers: 1e-12).
        stem: what turns pixels into tokens, `STEMS`; timm and transformers know "patch" only.
        registers: number of learned tokens after CLS, which no feature holds.
        layer_scale: first value of a factor for each channel of every residual branch; None for no
            such factors.
        mlp: gelu or swiglu.
        key_bias: whether keys have a bias. Without rope it has no effect on any feature.
        preprocessing: the transform of the weights; by default the paper's for `image_size`.

    Raises:
        UserError: if `heads` does not divide `embed_dim`, no patch fits into the image, or the stem
            does not make patches of this size.
    """

    has_drop_path = True
    patch_size: int

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
        position: PositionEncoding = "reference",
        norm_eps: float = 1e-6,
        stem: Stem = "patch",
        registers: int = 0,
        layer_scale: float | None = None,
        mlp: Mlp = "gelu",
        key_bias: bool = True,
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
        self.embed_dim, self.patch_size, self.registers = embed_dim, patch_size, registers
        self.position = None if position == "rope" else position
        self.heads, self.depth, self.mlp_ratio, self.mlp = heads, depth, mlp_ratio, mlp
        self.grid, self.channels = (side, side), channels
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.stem = stem
        self.patch_embed = _patch_embed(stem, channels, embed_dim, patch_size)
        convolutions = (name for name, x in self.patch_embed.named_parameters() if x.ndim == 4)
        self.first_layer = f"patch_embed.{next(convolutions)}"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.rope_embed = Rope(embed_dim // heads) if position == "rope" else None
        if position != "rope":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(embed_dim, heads, hidden, norm_eps, mlp, layer_scale, key_bias)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of std .02 (cut at absolute +-2), zero biases; norms at identity."""
        for name in ("cls_token", "pos_embed", "register_tokens"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.start)
            elif module is self.patch_embed.proj:
                cast(nn.Conv2d, module).reset_parameters()

    def tokens(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, T, D] that enter the first block, and the grid (h, w)."""
        self.check_images(images)
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise UserError(f"images of {height}x{width} px hold no patch of {self.patch_size} px")
        if self.stem != "patch":  # pixels that fill no patch are cropped, as the linear layer does
            rows, columns = height % self.patch_size, width % self.patch_size
            images = laid_out(images[..., : height - rows, : width - columns])
        patches = self.patch_embed(images).permute(0, 2, 3, 1)  # [B, h, w, D]
        grid = (patches.shape[1], patches.shape[2])
        first: Tensor = self.cls_token
        rest = patches.flatten(1, 2)
        if self.position is not None:
            first = first + self.pos_embed[:, :1]
            rest = rest + resample(self.pos_embed[:, 1:], self.grid, grid, self.position)
        if self.registers:
            first = torch.cat([first, self.register_tokens], dim=1)
        return torch.cat([first.expand(images.shape[0], -1, -1), rest], dim=1), grid

    def _rope(self, grid: tuple[int, int]) -> RopeTable | None:
        return None if self.rope_embed is None else self.rope_embed(grid, 1 + self.registers)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        drop_path_scale: Float[Tensor, "branches B"] | None = None,
        patches: Int[Tensor, "B k"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """The CLS token after the final norm; see `Backbone.forward`."""
        x, grid = self.tokens(images)
        rope = self._rope(grid)
        if patches is not None:
            first = torch.arange(1 + self.registers, device=patches.device)
            kept = torch.cat([first.expand(len(x), -1), patches + len(first)], dim=1)
            x = x.take_along_dim(kept[..., None], dim=1)
            rope = None if rope is None else (rope[0][kept][:, None], rope[1][kept][:, None])
        scales = [None] * self.depth if drop_path_scale is None else drop_path_scale.split(2)
        *earlier, last = cast(list[Block], list(self.blocks))
        for block, scale in zip(earlier, scales[:-1], strict=True):
            x = block(x, scale, rope=rope)
        return self.norm(last(x, scales[-1], first=True, rope=rope)).squeeze(1)

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """Tokens of the last blocks through the final norm; see `Backbone.features`."""
        if not 1 <= last <= self.depth:
            raise UserError(f"last must lie between 1 and the {self.depth} blocks, not {last}")
        explicit = self._block(-1 if attention is True else attention)
        x, grid = self.tokens(images)
        rope = self._rope(grid)
        matrix, keys, outputs = None, None, []
        for index, block in enumerate(cast(list[Block], list(self.blocks))):
            if attention is not False and index == explicit:
                x, matrix, keys = block.explicit(x, rope)
            else:
                x = block(x, rope=rope)
            if index >= self.depth - last:
                outputs.append(self.norm(x))
        stacked = torch.stack(outputs)  # [last, B, T, D]
        patches = stacked[:, :, 1 + self.registers :].transpose(2, 3).unflatten(3, grid)
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
        x, grid = self.tokens(images)
        rope = self._rope(grid)
        for earlier in blocks[:-1]:
            x = earlier(x, rope=rope)
        return blocks[-1].attn.rows(blocks[-1].norm1(x), queries, rope)

    def _block(self, index: int) -> int:
        """The index of a block from 0, from one that may be negative."""
        if not -self.depth <= index < self.depth:
            raise UserError(f"there is no block {index}: the network has {self.depth}")
        return index % self.depth

    def describe(self) -> dict[str, str]:
        """See `Backbone.describe`."""
        learned = f"learned for {self.grid[0]} x {self.grid[1]} patches, else {self.position}"
        parts = {
            "registers": str(self.registers or ""),
            "layer scale": "yes" if self._first_block.ls1 else "",
            "mlp": "" if self.mlp == "gelu" else self.mlp,
        }
        return {
            "feature": f"{self.embed_dim} numbers, the CLS token after the final norm",
            "patch": f"{self.patch_size} px",
            "positions": "rotary" if self.position is None else learned,
            "blocks": f"{self.depth}, of {self.heads} heads",
            **{name: value for name, value in parts.items() if value},
        }

    def layer_index(self, name: str) -> int:
        """See `Backbone.layer_index`."""
        module, *rest = name.split(".")
        if module == "blocks":
            return 1 + int(rest[0])
        return self.depth + 1 if module == "norm" else 0

    def resize_positions(
        self, tensors: dict[str, Tensor], position: PositionEncoding
    ) -> dict[str, Tensor]:
        """See `Backbone.resize_positions`; embeddings of no square grid stay as they are."""
        old = tensors.get("pos_embed")
        if old is None or old.ndim != 3 or position == "rope":
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
        if self.position is not None:
            positions = resample_with_cls(self.pos_embed, self.grid, grid, self.position)
            self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid
        if grid[0] == grid[1]:  # the sizes that `dino.create` can build
            self.spec = {**self.spec, "image_size": height}

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`; norms and keys must be those of timm."""
        self._check_layout("timm")
        rotary, eps = self.rope_embed is not None, 1e-5 if self.rope_embed is not None else 1e-6
        if self.norm.eps != eps:
            raise UserError(
                f"timm's ViTs {'with rotary positions ' * rotary}have the norm epsilon {eps:g}, "
                f"this one has {self.norm.eps:g}: use --format transformers or onnx"
            )
        arguments: dict[str, Any] = {
            "img_size": size,
            "patch_size": self.patch_size,
            "in_chans": self.channels,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
        }
        name = self.spec["arch"].replace("tiny", "small") if rotary else self.spec["arch"]
        ls1 = self._first_block.ls1
        scale = {"init_values": 1.0 if ls1 is None else ls1.start}  # 1 changes nothing
        if rotary:
            return self._timm_dinov3(name, arguments | scale)
        if not (self.registers or ls1 or self.mlp == "swiglu"):
            patch = 8 if self.patch_size == 8 and name != "vit_tiny" else 16  # those timm has
            name = "vit_giant_patch14_224" if "giant" in name else f"{name}_patch{patch}_224"
            return name, arguments
        name = "vit_giant" if self.mlp == "swiglu" else name.replace("tiny", "small")
        if self.mlp == "swiglu":  # counts both branches
            arguments["mlp_ratio"] = (
                2 * int(self.embed_dim * self.mlp_ratio) + 0.5
            ) / self.embed_dim
        elif "giant" in name:  # timm's has SwiGLU
            name = "vit_large"
        registers = {"reg_tokens": self.registers, "no_embed_class": True} if self.registers else {}
        name = f"{name}_patch14_{'reg4_' * bool(registers)}dinov2"
        return name, arguments | scale | registers

    def _timm_dinov3(self, name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        assert self.rope_embed is not None
        if not isinstance(self._first_block.attn.qkv, LinearWithoutKeyBias):
            raise UserError(
                "timm's ViTs with rotary positions have no bias of keys, this one has: use "
                "--format transformers or onnx"
            )
        if not self.rope_embed.has_usual_periods():
            raise UserError("timm's rotary positions have other periods: use --format onnx")
        biases = (block.attn.qkv.bias.chunk(3) for block in cast(list[Block], list(self.blocks)))
        biased = any(bool(q.any() or v.any()) for q, _, v in biases)
        name = "vit_large" if "giant" in name else name
        return f"{name}_patch16_dinov3{'_qkvb' * biased}", {
            **arguments,
            "num_reg_tokens": self.registers,
            **({"swiglu_mlp": True, "swiglu_align_to": 1} if self.mlp == "swiglu" else {}),
            "qkv_bias": biased,
            "global_pool": "token",
        }

    @property
    def _first_block(self) -> Block:
        return cast(Block, self.blocks[0])

    def _check_layout(self, library: str) -> None:
        if self.stem != "patch":
            raise UserError(f"{library} has no ViT with this stem of convolutions: use onnx")

    def transformers_config(self, size: int) -> dict[str, Any]:
        """See `Backbone.transformers_config`; with convolutions there is no such network."""
        self._check_layout("transformers")
        block, hidden = self._first_block, int(self.embed_dim * self.mlp_ratio)
        common = {
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "layer_norm_eps": self.norm.eps,
            "image_size": size,
            "patch_size": self.patch_size,
            "num_channels": self.channels,
            "torch_dtype": "float32",
        }
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        swiglu = self.mlp == "swiglu"
        if self.rope_embed is not None:
            if not self.rope_embed.has_usual_periods():
                raise UserError("transformers has no such periods of rotations: use --format onnx")
            return {
                "architectures": ["DINOv3ViTModel"],
                "model_type": "dinov3_vit",
                **common,
                "intermediate_size": hidden,
                "hidden_act": "silu" if swiglu else "gelu",
                "use_gated_mlp": swiglu,
                "num_register_tokens": self.registers,
                "rope_theta": BASE,
                "query_bias": True,
                "key_bias": not isinstance(block.attn.qkv, LinearWithoutKeyBias),
                "value_bias": True,
                "proj_bias": True,
                "mlp_bias": True,
                "layerscale_value": 1.0,
            }
        if self.registers or block.ls1 is not None or swiglu:
            registers = {"num_register_tokens": self.registers} if self.registers else {}
            return {
                "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
                "model_type": "dinov2_with_registers" if registers else "dinov2",
                **common,
                **dropout,
                **registers,
                "mlp_ratio": self._whole_mlp_ratio(hidden),
                "use_swiglu_ffn": swiglu,
                "hidden_act": "gelu",
                "qkv_bias": True,
                "layerscale_value": 1.0,
            }
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            **common,
            **dropout,
            "intermediate_size": hidden,
            "hidden_act": "gelu",
            "qkv_bias": True,
            "pooler_output_size": self.embed_dim,
            "pooler_act": "linear",
        }

    def _whole_mlp_ratio(self, hidden: int) -> int:
        """The ratio from which transformers computes this hidden size of DINOv2's MLP."""
        for ratio in range(1, 64):
            full = ratio * self.embed_dim
            if hidden == ((full * 2 // 3 + 7) // 8 * 8 if self.mlp == "swiglu" else full):
                return ratio
        raise UserError(
            f"transformers' DINOv2 has no MLP of {hidden} for embed_dim {self.embed_dim}: use "
            "--format timm or onnx"
        )


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
    "vit_large": {"embed_dim": 1024, "depth": 24, "heads": 16},
    "vit_giant": {"embed_dim": 1536, "depth": 40, "heads": 24},
}
"""Table 1, ViT-Ti of the published code, and ViT-L and ViT-g of DINOv2 (its Table 17)."""
