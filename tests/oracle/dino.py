"""A slow, obvious DINO: Algorithm 1 with multi-crop in naive loops, everything materialised.

Written from the paper's section 3.1 and its Algorithm 1. Views are a list of [B, C, S, S] tensors,
the two global ones first.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def loss(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, tau_s: float, tau_t: float
) -> Tensor:
    """Mean over pairs (a, v), a != v, and over images, of the cross-entropy, row by row."""
    total, count = torch.zeros((), dtype=student[0].dtype), 0
    for a, t in enumerate(teacher):
        for v, s in enumerate(student):
            if a == v:
                continue
            for row in range(len(t)):
                p_t = torch.exp((t[row] - center) / tau_t)
                p_t = (p_t / p_t.sum()).detach()
                p_s = torch.exp(s[row] / tau_s)
                total = total - (p_t * torch.log(p_s / p_s.sum())).sum() / len(t)
            count += 1
    return total / count


class Oracle:
    """Student, teacher, center and AdamW written out; `step` is one iteration."""

    def __init__(self, student: nn.Module, prototypes: int, *, m: float = 0.9) -> None:
        self.student, self.teacher = student, copy.deepcopy(student)
        self.center = torch.zeros(prototypes, dtype=torch.float64)
        self.m = m
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def step(
        self,
        views: list[Tensor],
        *,
        lr: float,
        wd: float,
        lam: float,
        tau_t: float,
        clip: float,
        frozen: bool,
        tau_s: float = 0.1,
    ) -> float:
        s = [self._logits(self.student, v) for v in views]
        t = [self._logits(self.teacher, v).detach() for v in views[:2]]
        value = loss(s, t, self.center, tau_s, tau_t)
        self.student.zero_grad()
        value.backward()
        self.center = self.m * self.center + (1 - self.m) * torch.cat(t).mean(0)
        for name, p in self.student.named_parameters():
            if p.grad is None:
                continue
            norm = math.sqrt(float((p.grad**2).sum()))
            if clip and norm + 1e-6 > clip:
                p.grad *= clip / (norm + 1e-6)
            if frozen and "last_layer" in name:
                continue
            decay = 0.0 if name.endswith(".bias") or p.ndim == 1 else wd
            self._adamw(name, p, lr, decay)
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for own, theirs in pairs:
                own.copy_(lam * own + (1 - lam) * theirs)
        return value.item()

    @staticmethod
    def _logits(network: nn.Module, view: Tensor) -> Tensor:
        return network.head(network.backbone(view))

    def _adamw(self, name: str, p: nn.Parameter, lr: float, wd: float) -> None:
        zeros = torch.zeros_like(p)
        first, second, count = self.moments.get(name, (zeros, zeros, 0))
        assert p.grad is not None
        first = 0.9 * first + 0.1 * p.grad
        second = 0.999 * second + 0.001 * p.grad**2
        count += 1
        self.moments[name] = first, second, count
        with torch.no_grad():
            p -= lr * wd * p
            update = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            p -= lr * update
