"""The interface of all networks: one vector an image, named features, transform, description.

Shapes: B batch, C channels, H W pixels, h w patches, T tokens (CLS first), D embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.decode import Sample, read_image
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.position_embedding import Position
from dino.runtime import memory_errors


@dataclass(frozen=True)
class Features:
    """Named outputs of the last blocks, earliest block first, each through the final norm.

    Attributes:
        cls: [last, B, D], the CLS token (convnets: the pooled feature).
        patches: [last, B, D, h, w], the patch tokens on their grid.
        attention: [B, heads, T, T] of one block, after the softmax; None unless requested.
    """

    cls: Float[Tensor, "last B D"]
    patches: Float[Tensor, "last B D h w"]
    attention: Float[Tensor, "B heads T T"] | None = None


class Backbone(nn.Module):
    """A network `f` without its projection head (paper section 3.1).

    Other packages depend on these attributes and methods, never on the class or name of a network.

    Attributes:
        has_drop_path: whether `forward` takes `drop_path_scale`.
        channels: C, of the images.
        embed_dim: D, the length of a feature.
        patch_size: pixels a side of a patch; None for networks without patches.
        depth: transformer blocks whose features and attention can be read; 0 for none.
        heads: attention heads of each of these blocks.
        position: how the learned position embedding is resampled; None for networks without one.
        first_layer: name, in the state dict, of the weights of the first layer.
        preprocessing: the transform that belongs to the weights.
        spec: the arguments of `dino.create` that build this architecture.
        origin: of the weights, `dino.weights.checkpoint.Checkpoint.origin`; None if untrained.
    """

    has_drop_path: ClassVar[bool] = False
    channels: int = 3
    embed_dim: int
    patch_size: int | None = None
    depth: int = 0
    heads: int = 0
    position: Position | None = None
    first_layer: str
    preprocessing: Preprocessing
    spec: dict[str, Any]
    origin: dict[str, Any] | None = None

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

    def resize_positions(self, tensors: dict[str, Tensor], position: Position) -> dict[str, Tensor]:
        """A copy of a state dict whose position embedding has the size of this network's.

        Args:
            tensors: of the same architecture.
            position: how the network that the tensors come from resamples.
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

    def preprocess(self, image: Sample) -> Float[Tensor, "C S S"]:
        """The input tensor for a picture, or for its levels."""
        return self.preprocessing(image)

    @torch.inference_mode()
    def embed(
        self, paths: str | Path | Sequence[str | Path], batch: int = 64
    ) -> Float[np.ndarray, "n D"]:
        """Features (float32) of the pictures at `paths`, in order, in evaluation mode.

        Args:
            paths: one path, which gives one row, or several.
            batch: images at a time.

        Raises:
            UserError: for a picture that cannot be read, or too little memory for `batch` images.
        """
        if isinstance(paths, (str, Path)):
            paths = [paths]
        training, device = self.training, next(self.parameters()).device
        read = partial(read_image, pixels=self.preprocessing.pixels)
        self.eval()
        try:
            with memory_errors("batch"):
                rows = [
                    self(torch.stack([self.preprocess(read(path)) for path in some]).to(device))
                    for some in (paths[i : i + batch] for i in range(0, len(paths), batch))
                ]
        finally:
            self.train(training)
        table = torch.cat(rows) if rows else torch.empty(0, self.embed_dim)
        return table.float().cpu().numpy()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether outputs of `module` depend on the other samples of a batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
