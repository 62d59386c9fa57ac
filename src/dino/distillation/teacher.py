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

    As in the published code it stays in training mode: batch norm uses the statistics of the batch
    and updates the teacher's running statistics.

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
        """The moving average after a step of the student; none where `found_inf` is true."""
        ema_update(self, student, self.momentum(step), found_inf)


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, found_inf: Tensor | None = None
) -> None:
    """theta_t <- momentum * theta_t + (1 - momentum) * theta_s, in place, parameters only.

    Args:
        teacher: updated; its buffers are not.
        student: after its step.
        momentum: lambda, in [0, 1].
        found_inf: 0-dim bool; where true the teacher does not change.
    """
    targets: list[Tensor] = list(teacher.parameters())
    sources: list[Tensor] = list(student.parameters())
    weight = torch.full((), 1 - momentum, dtype=targets[0].dtype, device=targets[0].device)
    if found_inf is not None:  # on the device: no host synchronisation
        weight = torch.where(found_inf, 0.0, weight)
    torch._foreach_lerp_(targets, sources, [weight] * len(targets))
