"""What every network offers: one vector an image, named intermediate features, its own transform.

Shapes: B batch, C channels, H W pixels, h w patches, T tokens (CLS first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.decode import Sample, read_image
from dino.data.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Features:
    """Named outputs of the last blocks, earliest block first, each through the final norm.

    Attributes:
        cls: [last, B, D], the CLS token (convnets: the pooled feature).
        patches: [last, B, D, h, w], the patch tokens on their grid.
        attention: [B, heads, T, T] of one block, after the softmax; None unless asked for.
    """

    cls: Float[Tensor, "last B D"]
    patches: Float[Tensor, "last B D h w"]
    attention: Float[Tensor, "B heads T T"] | None = None


class Backbone(nn.Module):
    """A network `f` without its projection head (paper section 3.1).

    Attributes:
        width: D, the length of a feature.
        patch_size: pixels a side of a patch; None for networks without patches.
        preprocessing: the transform that belongs to the weights.
        spec: the arguments of `dino.create` that build this architecture again.
        residual_branches: how many residual branches drop path can act on (0: none).
        origin: the file that the weights were loaded from: its dialect, name and SHA-256; None for
            an untrained network.
    """

    width: int
    patch_size: int | None = None
    preprocessing: Preprocessing
    spec: dict[str, Any]
    residual_branches: int = 0
    origin: dict[str, str] | None = None

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Float[Tensor, "branches B"] | None = None
    ) -> Float[Tensor, "B D"]:
        """The feature of the paper: the CLS token after the final norm (convnets: pooled).

        Args:
            images: normalised images of any height and width that holds at least one patch.
            keep: drop path: the factor, 0 or 1 / (1 - rate), by which each sample's residual
                branch is multiplied; None keeps all. Only where `residual_branches` is not 0.
        """
        raise NotImplementedError

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """Named features of the last blocks.

        Args:
            images: normalised images.
            last: how many of the last blocks.
            attention: True for the attention matrix of the last block, or the index of a block
                (negative from the end); False for none. Only that block materialises a matrix.
        """
        raise NotImplementedError

    def preprocess(self, image: Sample) -> Float[Tensor, "C S S"]:
        """The tensor that this network's weights expect for a picture, or for its levels."""
        return self.preprocessing(image)

    @torch.inference_mode()
    def embed(self, paths: Sequence[str | Path], batch: int = 64) -> np.ndarray:
        """Features [n, D] (float32) of the pictures at `paths`, in order, in evaluation mode."""
        training, device = self.training, next(self.parameters()).device
        read = partial(read_image, pixels=self.preprocessing.pixels)
        self.eval()
        try:
            rows = [
                self(torch.stack([self.preprocess(read(path)) for path in part]).to(device))
                for part in (paths[i : i + batch] for i in range(0, len(paths), batch))
            ]
        finally:
            self.train(training)
        table = torch.cat(rows) if rows else torch.empty(0, self.width)
        return table.float().cpu().numpy()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether outputs of `module` depend on the other samples of a batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
