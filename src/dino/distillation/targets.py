"""From the teacher's logits to the targets of the student (paper section 3.1, appendix B).

Shapes: A teacher views, B batch, K prototypes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Centering(nn.Module):
    """Centering and sharpening.

    Args:
        prototypes: K.
        momentum: m of equation 4.

    Attributes:
        center: [K], a buffer, subtracted from the teacher's logits as in Algorithm 1 and the
            published code (section 3.1 prints g + c).
    """

    center: Tensor

    def __init__(self, prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "A B K"], temperature: float) -> Float[Tensor, "A B K"]:
        """P_t, equation 1: softmax((logits - center) / temperature), detached."""
        return logits.sub(self.center).div_(temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(
        self, total: Float[Tensor, " K"], rows: int, found_inf: Tensor | None = None
    ) -> None:
        """Equation 4, once a step: c <- m c + (1 - m) mean of the raw teacher logits.

        Args:
            total: sum of the teacher's logits over its views and the effective batch.
            rows: the number of rows in the sum.
            found_inf: 0-dim bool; where true the center does not change.
        """
        center = self.center.lerp(total.to(self.center.dtype) / rows, 1 - self.momentum)
        if found_inf is not None:
            center = torch.where(found_inf, self.center, center)
        self.center.copy_(center)


def targets_for_views(
    targets: Float[Tensor, "A B K"], first: int
) -> tuple[Float[Tensor, "v B K"], int]:
    """The targets of the student views from index `first` on.

    Returns:
        t_v and n_v of `distillation.loss`: for the views of the teacher (`first` 0) one target a
        view, the sum over the *other* teacher views; for later views one common target, the sum
        over all.
    """
    count = len(targets)
    if first > 0:
        return targets.sum(dim=0, keepdim=True), count
    others = targets.roll(1, dims=0)
    for shift in range(2, count):
        others = others + targets.roll(shift, dims=0)
    return others, count - 1


def entropy(probabilities: Float[Tensor, "*rows K"]) -> Float[Tensor, ""]:
    """Mean entropy of the rows in nats (h of equation 5); 0 log 0 counts as 0."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
