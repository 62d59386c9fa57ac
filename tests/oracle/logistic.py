"""Logistic regression with the paper's objective written out, minimised by Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor


def objective(weight: Tensor, features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """(1 / n) sum of losses + (lambda / n) / 2 |W|^2, W [C, N]."""
    n = len(labels)
    loss = torch.nn.functional.cross_entropy(features @ weight.T, labels)
    return loss + penalty / n * weight.square().sum() / 2


def fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """W [C, N] at the minimum."""
    shape = (classes, features.shape[1])

    def flat(w: Tensor) -> Tensor:
        return objective(w.view(shape), features, labels, penalty)

    weight = torch.zeros(shape, dtype=torch.float64).flatten()
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(flat, weight)
        if gradient.abs().max() < 1e-13:
            break
        step = torch.linalg.solve(torch.autograd.functional.hessian(flat, weight), gradient)
        scale = 1.0
        while flat(weight - scale * step) > flat(weight) and scale > 1e-6:
            scale /= 2
        weight = weight - scale * step
    return weight.view(shape)
