"""From the teacher's logits to the targets of the student (paper section 3.1, appendix B).

Shapes: A teacher views, B batch, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.runtime import all_max, all_sum


class Targets(nn.Module):
    """What is made of the teacher's logits; this one leaves them uncentered (Fig. 7, "none").

    Args:
        unit: whether targets are l2-normalised vectors, for the losses that compare those, and not
            distributions.

    Attributes:
        needs_full_batch: what relates the images of a step to each other; empty for nothing.
    """

    needs_full_batch = ""

    def __init__(self, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "A B K"], temperature: float) -> Float[Tensor, "A B K"]:
        """P_t, equation 1: softmax(logits / temperature), detached."""
        return self._sharpened(logits.clone(), temperature)

    def _sharpened(self, logits: Tensor, temperature: float) -> Tensor:
        """The targets of centered logits, which are overwritten; arg-max at temperature 0."""
        if self.unit:
            return F.normalize(logits, dim=-1)
        if temperature == 0:
            largest = logits.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, largest, 1.0)
        return logits.div_(temperature).softmax(dim=-1)

    def update(
        self, total: Float[Tensor, " K"], rows: int, found_inf: Tensor | None = None
    ) -> None:
        """Follow the teacher's logits of a step; here there is nothing to follow.

        Args:
            total: sum of the teacher's logits over its views and the effective batch.
            rows: the number of rows in the sum.
            found_inf: 0-dim bool; where true nothing changes.
        """


class Centering(Targets):
    """Centering and sharpening.

    Args:
        prototypes: K.
        momentum: m of equation 4.
        unit: as for `Targets`; the vectors are centered, then normalised (appendix B, MSE).

    Attributes:
        center: [K], a buffer, subtracted from the teacher's logits as in Algorithm 1 and the
            published code (section 3.1 prints g + c).
    """

    center: Tensor

    def __init__(self, prototypes: int, *, momentum: float = 0.9, unit: bool = False) -> None:
        super().__init__(unit=unit)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "A B K"], temperature: float) -> Float[Tensor, "A B K"]:
        """P_t, equation 1: softmax((logits - center) / temperature), detached."""
        return self._sharpened(logits.sub(self.center), temperature)

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


class SinkhornKnopp(Targets):
    """The operation of SwAV in place of centering; with one iteration, softmax over the batch.

    The rows of all teacher views and ranks are one matrix x = exp(logits / temperature), whose
    columns (prototypes) and rows (samples) are divided by their sums in turn (appendix B).

    Args:
        iterations: the paper names no number; SwAV's is 3.
    """

    needs_full_batch = "an operation over the batch (teacher.targets)"

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "A B K"], temperature: float) -> Float[Tensor, "A B K"]:
        """The matrix after all iterations; computed in logarithms, so that nothing overflows."""
        x = logits / temperature
        for _ in range(self.iterations):
            largest = all_max(x.amax(dim=(0, 1)))
            x = x - largest - all_sum((x - largest).exp().sum(dim=(0, 1))).log()
            x = x.log_softmax(dim=-1)
        return x.exp()


class KeyQueue(Targets):
    """The l2-normalised outputs as keys, and those of earlier steps as negatives (MoCo).

    Args:
        size: Q, the number of negatives; the first are random.
        prototypes: K.

    Attributes:
        negatives: [Q, K], a buffer, the oldest first.
    """

    negatives: Tensor

    def __init__(self, size: int, prototypes: int) -> None:
        super().__init__(unit=True)
        self.register_buffer("negatives", F.normalize(torch.randn(size, prototypes), dim=1))

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "A B K"], found_inf: Tensor) -> None:
        """Replace the oldest negatives by the keys of all ranks; nothing where `found_inf`."""
        queue = torch.cat([self.negatives, keys.flatten(0, 1)])[-len(self.negatives) :]
        self.negatives.copy_(torch.where(found_inf, self.negatives, queue))


def keys_for_views(targets: Float[Tensor, "A B K"], first: int) -> Float[Tensor, "v n B K"]:
    """The single targets whose sum `targets_for_views` returns."""
    if first > 0:
        return targets[None]
    others = [targets.roll(shift, dims=0) for shift in range(1, len(targets))]
    return torch.stack(others, dim=1)


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
