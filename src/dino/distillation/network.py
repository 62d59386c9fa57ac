"""g = h o f: a backbone and its projection head (paper section 3.1).

Shapes: V views, B batch, S pixels a side, D embed_dim, K prototypes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.models.backbone import Backbone
from dino.models.head import Head
from dino.runtime import full_precision


class Network(nn.Module):
    """A backbone and its projection head; student and teacher are both one.

    A student may have a predictor (section 5.1), which maps its projection (`Head.projection`).
    """

    def __init__(self, backbone: Backbone, head: Head, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor

    @property
    def new(self) -> list[nn.Module]:
        """The modules behind the backbone."""
        return [self.head, *([] if self.predictor is None else [self.predictor])]

    def output(self, z: Float[Tensor, "B bottleneck"]) -> Float[Tensor, "B K"]:
        """The output of the head for the input of its prototypes, through the predictor."""
        outputs: Tensor = self.head.last_layer(z)
        if self.predictor is not None and self.head.bottleneck is None:
            outputs = self.predictor(outputs)
        return outputs

    def features(
        self,
        images: Float[Tensor, "V B C S S"],
        drop_path_scale: Float[Tensor, "branches V B"] | None = None,
        patches: Int[Tensor, "V B k"] | None = None,
    ) -> Float[Tensor, "V B D"]:
        """Features of a group of equally large views, promoted to at least fp32.

        `drop_path_scale` and `patches`: see `Backbone.forward`.
        """
        options: dict[str, Tensor] = {}
        if drop_path_scale is not None:
            options["drop_path_scale"] = drop_path_scale.flatten(1, 2)
        if patches is not None:
            options["patches"] = patches.flatten(0, 1)
        features = self.backbone(images.flatten(0, 1), **options)
        if features.dtype in (torch.bfloat16, torch.float16):
            features = features.float()
        return features.unflatten(0, images.shape[:2])

    def forward(
        self, images: Float[Tensor, "V B C S S"]
    ) -> tuple[Float[Tensor, "V B D"], Float[Tensor, "V B K"]]:
        """Features and logits of a group of equally large views, in at least fp32."""
        features = self.features(images)
        with full_precision(features.device):
            logits = self.head(features.flatten(0, 1))
        return features, logits.unflatten(0, images.shape[:2])
