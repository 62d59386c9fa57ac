"""The teacher: an exponential moving average of the student (paper section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.distillation.network import Network


class Teacher(Network):
    """The momentum teacher: a copy of the student at the start, then its moving average.

    It stays in training mode like the published code's: that matters only for batch norm, whose
    statistics are then the batch's, while the teacher keeps running statistics of its own.

    Args:
        student: copied; no storage is shared and no parameter gets a gradient.
        momentum: lambda of a step, in [0, 1].
    """

    def __init__(self, student: Network, momentum: Callable[[int], float]) -> None:
        super().__init__(copy.deepcopy(student.backbone), copy.deepcopy(student.head))
        self.requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "A B C S S"]
    ) -> tuple[Float[Tensor, "A B D"], Float[Tensor, "A B K"]]:
        """Features and logits of the teacher's views."""
        return super().forward(images)

    def update(self, student: Network, step: int, found_inf: Tensor | None = None) -> None:
        """Move towards the student after its step; not at all where `found_inf` is true."""
        ema_update(self, student, self.momentum(step), found_inf)


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, found_inf: Tensor | None = None
) -> None:
    """theta_t <- momentum * theta_t + (1 - momentum) * theta_s, parameters only, no buffers.

    Args:
        teacher: moved in place.
        student: after its step.
        momentum: lambda, in [0, 1].
        found_inf: 0-dim bool; where true the teacher does not move.
    """
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    weight = torch.full((), 1 - momentum, dtype=ours[0].dtype, device=ours[0].device)
    if found_inf is not None:  # decided on the device: no host synchronisation
        weight = torch.where(found_inf, 0.0, weight)
    torch._foreach_lerp_(ours, theirs, [weight] * len(ours))
