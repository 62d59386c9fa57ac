"""A network whose feature is known by looking, and colours to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dino.data.preprocessing import Preprocessing
from dino.models.features import Backbone

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
