"""The teacher: an exponential moving average of the student (paper section 3.1), or a past student.

Section 5.2 and Fig. 6 compare four kinds, which `Schedules.momentum_at` and the moment of the
update distinguish; none of them needs more memory than the moving average.

* momentum: lambda < 1 after the student's step.
* student_copy: lambda = 0 after it, so that the teacher is the student that it teaches.
* previous_iteration: lambda = 0 *before* it, so that the teacher is one step behind.
* previous_epoch: lambda = 0 after the last step of each epoch, else 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

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

    @torch.no_grad()
    def update(self, student: Network, step: int, found_inf: Tensor | None = None) -> None:
        """theta_t <- lambda * theta_t + (1 - lambda) * theta_s, parameters only, no buffers.

        Args:
            student: after its step (before it for previous_iteration).
            step: 0-based, for the momentum.
            found_inf: 0-dim bool; where true the teacher does not change.
        """
        ours: list[Tensor] = list(self.parameters())
        theirs: list[Tensor] = [*student.backbone.parameters(), *student.head.parameters()]
        weight = ours[0].new_full((), 1 - self.momentum(step))
        if found_inf is not None:  # on the device: no host synchronisation
            weight = torch.where(found_inf, 0.0, weight)
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))
