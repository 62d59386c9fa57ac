"""The linear probe as published: one layer, one learning rate, torch's own SGD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def train(
    start: Tensor,
    epochs: Sequence[Iterable[tuple[Tensor, Tensor]]],
    rate: float,
) -> nn.Linear:
    """SGD, momentum .9, no decay; the cosine moves from epoch to epoch."""
    layer = nn.Linear(start.shape[1], start.shape[0], dtype=start.dtype)
    with torch.no_grad():
        layer.weight.copy_(start)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=0)
    for epoch, steps in enumerate(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * epoch / len(epochs))) / 2
        for features, labels in steps:
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features), labels).backward()
            optimizer.step()
    return layer
