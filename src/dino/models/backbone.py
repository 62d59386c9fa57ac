"""The interface of all networks: one vector an image, named features, transform, description.

Shapes: B batch, C channels, H W pixels, h w patches, T tokens (CLS, registers, patches), D
embed_dim, d = D over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.inputs import check_images, read_images, read_sample
from dino.models.position_embedding import Position
from dino.models.rope import PositionEncoding
from dino.runtime import memory_errors
from dino.settings import Range, conform


@dataclass(frozen=True)
class Features:
    """Named outputs of the last blocks, earliest block first, each through the final norm.

    Attributes:
        cls: [last, B, D], the CLS token (convnets: the pooled feature).
        patches: [last, B, D, h, w], the patch tokens on their grid.
        attention: [B, heads, T, T] of one block, after the softmax; None unless requested.
        keys: [B, heads, T, d] of that attention.
    """

    cls: Float[Tensor, "last B D"]
    patches: Float[Tensor, "last B D h w"]
    attention: Float[Tensor, "B heads T T"] | None = None
    keys: Float[Tensor, "B heads T d"] | None = None

    @property
    def attention_maps(self) -> Float[Tensor, "B heads h w"]:
        """The attention of the CLS token to the patches on their grid.

        Values are those of the softmax: a map sums to 1 minus the CLS token's attention to itself
        and to registers.

        Raises:
            UserError: if the attention was not requested.
        """
        if self.attention is None:
            raise UserError("attention_maps needs features(images, attention=True)")
        grid = self.patches.shape[-2:]
        return self.attention[:, :, 0, -grid.numel() :].unflatten(2, grid)

    @property
    def key_maps(self) -> Float[Tensor, "B D h w"]:
        """The keys of the patches on their grid, those of all heads joined.

        Raises:
            UserError: if the attention was not requested.
        """
        if self.keys is None:
            raise UserError("key_maps needs features(images, attention=True)")
        grid = self.patches.shape[-2:]
        return self.keys[:, :, -grid.numel() :].transpose(2, 3).flatten(1, 2).unflatten(2, grid)


class Backbone(nn.Module):
    """A network `f` without its projection head (paper section 3.1).

    Other packages depend on these attributes and methods, never on the class or name of a network.

    Attributes:
        has_drop_path: whether `forward` takes `drop_path_scale` and, of ViTs, `patches`: indices
            [B, k], image by image, of the patches that the blocks process; None for all.
        channels: C, of the images.
        embed_dim: D, the length of a feature.
        patch_size: pixels a side of a patch; None for networks without patches.
        depth: transformer blocks whose features and attention can be read; 0 for none.
        heads: attention heads of each of these blocks.
        registers: tokens between CLS and the patches, which no feature holds.
        position: how the learned position embedding is resampled; None for networks without one.
        first_layer: name, in the state dict, of the weights of the first layer.
        preprocessing: the transform that belongs to the weights.
        spec: the arguments of `dino.create` that build this architecture.
        origin: of the weights, `dino.weights.checkpoint.Checkpoint.origin`; None if untrained.
        loaded: where the weights come from in words, such as "runs/photos, teacher, step 300"; None
            for those of no file.
    """

    has_drop_path: ClassVar[bool] = False
    channels: int = 3
    embed_dim: int
    patch_size: int | None = None
    depth: int = 0
    heads: int = 0
    registers: int = 0
    position: Position | None = None
    first_layer: str
    preprocessing: Preprocessing
    spec: dict[str, Any]
    origin: dict[str, Any] | None = None
    loaded: str | None = None

    def __repr__(self) -> str:
        """One line; `torch.nn.Module.__repr__(backbone)` lists the layers."""
        arch = getattr(self, "spec", {}).get("arch", type(self).__name__)
        patch = f"/{self.patch_size}" if self.patch_size else ""
        return f"<dino {arch}{patch}: {self.loaded or 'weights from no file'}>"

    @property
    def residual_branches(self) -> int:
        """The number of residual branches with drop path."""
        return 2 * self.depth if self.has_drop_path else 0

    @torch.no_grad()
    def feature_of_zeros(self, size: int) -> Float[Tensor, "1 D"]:
        """The feature of one image of zeros; mode, statistics and random state do not change."""
        training, device = self.training, next(self.parameters()).device
        try:
            with torch.random.fork_rng(devices=[]):
                return self.eval()(torch.zeros(1, self.channels, size, size, device=device))
        finally:
            self.train(training)

    def check_size(self, size: int) -> None:
        """Raise `UserError` if the network takes no images of `size` px."""
        try:
            self.feature_of_zeros(size)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{self.spec['arch']} takes no images of {size} px ({reason}): change the size, or "
                "take a network for any size: a convnet, or a transformer of timm that knows "
                "dynamic_img_size"
            ) from None

    def describe(self) -> dict[str, str]:
        """The feature and the sizes of the architecture in words, for tables and model cards."""
        return {"feature": f"{self.embed_dim} numbers, pooled from the last layer"}

    def layer_index(self, name: str) -> int:
        """The layer of a parameter, for a layer-wise decay of the learning rate.

        Returns:
            0 before the blocks, 1 to `depth` for a block, `depth` + 1 after them.
        """
        return self.depth + 1

    def resize_positions(
        self, tensors: dict[str, Tensor], position: PositionEncoding
    ) -> dict[str, Tensor]:
        """A copy of a state dict whose position embedding has the size of this network's.

        Args:
            tensors: of the same architecture.
            position: how the network that the tensors come from resamples; rope if it has none.
        """
        return tensors

    def fix_size(self, height: int, width: int) -> None:
        """Resample the position embedding permanently; `UserError` if such images hold no patch."""

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """Name and all arguments with which `timm.create_model` builds this network for `size` px.

        Raises:
            UserError: if timm has no such network.
        """
        raise UserError(f"timm has no layout for {self.spec['arch']}: use --format onnx")

    def transformers_config(self, size: int) -> dict[str, Any]:
        """The `config.json` with which transformers builds this network for `size` px.

        Raises:
            UserError: if transformers has no such network.
        """
        raise UserError(
            f"transformers has no layout for {self.spec['arch']}: use --format timm or onnx"
        )

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        drop_path_scale: Float[Tensor, "branches B"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """The feature of the paper: the CLS token after the final norm (convnets: pooled).

        Args:
            images: normalised images of any height and width of at least one patch.
            drop_path_scale: the factor, 0 or 1 / (1 - rate), of each sample's residual branch; None
                for no drop path. Only if `has_drop_path`.
        """
        raise NotImplementedError

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """Named features of the last blocks.

        Args:
            images: normalised images.
            last: the number of blocks.
            attention: True for the attention matrix of the last block, or the index of a block
                (negative from the end); False for none. Only that block materialises a matrix.
        """
        raise NotImplementedError

    def first_blocks(self, count: int) -> Backbone:
        """The network that ends with block `count`, of 1 to `depth`, and the final norm.

        It shares the weights. What it returns is what `features` returns of that block.

        Raises:
            UserError: if the network has no such block.
        """
        raise UserError(f"{self.spec['arch']} has no blocks to choose from: leave out the block")

    def attention_rows(
        self, images: Float[Tensor, "B C H W"], queries: Sequence[int], block: int = -1
    ) -> Float[Tensor, "B heads Q T"]:
        """The attention of some tokens to all tokens, after the softmax.

        These rows of `Features.attention` need memory for Q x T numbers a head, not T x T.

        Args:
            images: normalised images.
            queries: indices of the tokens: 0 is CLS, then come registers, then the patches row by
                row.
            block: index of the block, negative from the end.

        Raises:
            UserError: if the network has no such attention.
        """
        raise no_attention(self.spec["arch"])

    def check_images(self, images: Any) -> None:
        """Raise `UserError` for images that `forward` cannot take; nothing in a compiled graph."""
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined, no-untyped-call]
            check_images(images, self.channels, next(self.parameters(), None))

    def preprocess(self, image: Any) -> Float[Tensor, "C S S"]:
        """The input tensor for a picture, its file or array, or its levels (from a `Source`)."""
        pixels = self.preprocessing.pixels
        levels = pixels.low is not None and getattr(image, "dtype", None) is torch.uint8
        if not (levels or isinstance(image, Image.Image)):
            image = read_sample(image, pixels)
        return self.preprocessing(image)

    @torch.inference_mode()
    def embed(self, images: Any, batch: int = 64) -> Float[np.ndarray, "n D"]:
        """Features (float32) of images, in order, in evaluation mode and through the transform.

        Args:
            images: a file, a PIL image or an array gives one row; a folder one for each image in it
                (sorted by path), and a sequence, an iterator or a data set one for each item.
                Arrays and tensors are [H, W], [H, W, C] or [C, H, W], with one axis more for
                several; they hold 8 or 16-bit integers, or floats from 0 to 1.
            batch: images at a time.

        Raises:
            UserError: for an image that cannot be read, or too little memory for `batch` images.
        """
        batch = conform(batch, Annotated[int, Range(low=1)], "batch")
        training, parameter = self.training, next(self.parameters())
        inputs = map(self.preprocessing, read_images(images, self.preprocessing.pixels))
        rows = []
        self.eval()
        try:
            with memory_errors("batch"):
                while some := list(islice(inputs, batch)):
                    rows.append(self(torch.stack(some).to(parameter)).float().cpu())
        finally:
            self.train(training)
        return torch.cat(rows or [torch.empty(0, self.embed_dim)]).numpy()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether outputs of `module` depend on the other samples of a batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def no_attention(name: str) -> UserError:
    """The error for a network `name` whose attention is requested and that has none."""
    return UserError(f"{name} has no CLS attention: use a vit_tiny, vit_small or vit_base")
