"""A network whose feature is known by looking, and colours to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone, Features

COLORS = {"blue": (10, 30, 220), "green": (20, 200, 40), "red": (230, 20, 10)}


class MeanColor(Backbone):
    """The mean colour of the normalised image, through one weight; dropout if left in training."""

    width = 3
    preprocessing = Preprocessing(resize=8, crop=8)
    spec: dict[str, Any] = {"arch": "mean color"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor, keep: None = None) -> Tensor:
        return self.dropout(self.scale * images.mean(dim=(2, 3)))


class PatchColors(Backbone):
    """The mean colour of each patch of four pixels: what a patch token ought to tell apart."""

    width, patch_size = 3, 4
    preprocessing = Preprocessing(resize=8, crop=8)
    spec: dict[str, Any] = {"arch": "patch colours"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, keep: None = None) -> Tensor:
        return self.scale * images.mean(dim=(2, 3))

    def features(self, images: Tensor, last: int = 1, attention: bool | int = False) -> Features:
        patches = nn.functional.avg_pool2d(self.scale * images, 4)
        return Features(self(images)[None], patches[None])
