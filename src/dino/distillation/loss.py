"""The loss (paper section 3.1, equations 1 to 5) in the form that separates over student views.

With q_a the target that teacher view a gives and s_v the logits of student view v over the student
temperature, the loss is the mean over the pairs (a, v), v != a, of the cross-entropy
H(q_a, softmax(s_v)). For one view v, summed over the n_v teacher views it must match, that is

    n_v * logsumexp(s_v) - <t_v, s_v>,    t_v = sum of q_a over a != v,

with the gradient n_v * softmax(s_v) - t_v for s_v. So each view's term stands alone once the
targets are known: views can be streamed, split and accumulated in any way with the same result,
and logits need to live only for a moment (`prototype_cross_entropy`).

Shapes: V student views, A teacher views, B batch, K prototypes, E bottleneck width.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24
"""Logits computed at a time (64 MiB of fp32): large enough for full speed, small beside a ViT."""

CACHED_ELEMENTS = 2**18
"""Elements of the prototypes' gradient finished together while a CPU's cache holds them."""


class DINOLoss(nn.Module):
    """Targets by centering and sharpening, cross-entropy over all pairs of different views.

    In naive loops, for student logits S [V, B, K] and teacher logits T [A, B, K]:

        loss = 0
        for a in range(A):
            for v in range(V):
                if v != a:
                    q = softmax((T[a] - center) / teacher_temperature)
                    loss += mean over B of -sum(q * log_softmax(S[v] / student_temperature))
        loss /= number of pairs

    Equation 3 sums over the pairs; the published code, and so its learning rates, average.

    Args:
        prototypes: K.
        student_temperature: tau_s.
        center_momentum: m of equation 4.

    Attributes:
        center: [K], subtracted from the teacher's logits. (Section 3.1 prints g + c; Algorithm 1
            and the code subtract.) A buffer: it is part of every checkpoint.
    """

    center: Tensor

    def __init__(
        self, prototypes: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def targets(
        self, teacher_logits: Float[Tensor, "A B K"], temperature: float
    ) -> Float[Tensor, "A B K"]:
        """P_t, equation 1: softmax((T - center) / temperature), detached."""
        return teacher_logits.sub(self.center).div_(temperature).softmax(dim=-1)

    @torch.no_grad()
    def update_center(
        self, total: Float[Tensor, " K"], rows: int, refused: Tensor | None = None
    ) -> None:
        """Equation 4, once a step: c <- m c + (1 - m) mean of the raw teacher logits.

        Args:
            total: sum of the teacher's logits over both views and the whole effective batch.
            rows: how many rows were summed.
            refused: 0-dim bool; where true the center stays as it is.
        """
        center = self.center.lerp(total.to(self.center.dtype) / rows, 1 - self.center_momentum)
        self.center.copy_(center if refused is None else torch.where(refused, self.center, center))

    def forward(
        self,
        student_logits: Float[Tensor, "V B K"],
        teacher_logits: Float[Tensor, "A B K"],
        temperature: float,
    ) -> Float[Tensor, ""]:
        """The loss of whole, materialised logits; changes nothing (call `update_center` after).

        Args:
            student_logits: raw logits of all views, the teacher's views first.
            teacher_logits: raw logits of the teacher's views.
            temperature: tau_t.
        """
        targets, views = self.targets(teacher_logits, temperature), len(student_logits)
        total = student_logits.new_zeros(())
        for first, last in ((0, len(targets)), (len(targets), views)):
            if first < last:
                matched = match(targets, first)
                total = total + prototype_cross_entropy(
                    student_logits[first:last], None, None, *matched, self.student_temperature
                )
        return total / (pairs(len(targets), views) * student_logits.shape[1])


def pairs(teacher_views: int, student_views: int) -> int:
    """Number of pairs (a, v) with v != a: 2n + 2 for two global and n local views."""
    return teacher_views * (student_views - 1)


def match(targets: Float[Tensor, "A B K"], first: int) -> tuple[Float[Tensor, "v B K"], int]:
    """What student views from index `first` on must match.

    Returns:
        t_v and n_v. For the teacher's own views (`first` 0) one target a view, the sum over the
        *other* teacher views; for all later views one common target, the sum over all.
    """
    count = len(targets)
    if first > 0:
        return targets.sum(dim=0, keepdim=True), count
    others = targets.roll(1, dims=0)
    for shift in range(2, count):
        others = others + targets.roll(shift, dims=0)
    return others, count - 1


def prototype_cross_entropy(
    z: Float[Tensor, "V B E"],
    weight_v: Float[Tensor, "K E"] | None,
    weight_g: Float[Tensor, "K 1"] | None,
    targets: Float[Tensor, "v B K"],
    count: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Sum over views and rows of `count * logsumexp(s) - <t, s>`, s = z @ prototypes.T / tau_s.

    Logits, softmax and gradient live for `CHUNK_ELEMENTS` at a time; the gradient is made in the
    forward pass, while the logits are there, and never again.

    Args:
        z: what the prototypes are compared with, V views of B rows.
        weight_v: the prototypes, or their directions; None if `z` holds the logits themselves.
        weight_g: norms of the prototypes; None if `weight_v` is used as it is.
        targets: t_v, of each view or (first axis 1) common to all.
        count: n_v, the number of distributions summed in each row of `targets`.
        temperature: tau_s.
    """
    total: Tensor = _PrototypeCrossEntropy.apply(z, weight_v, weight_g, targets, count, temperature)
    return total


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight_v: Tensor | None,
        weight_g: Tensor | None,
        targets: Tensor,
        count: int,
        temperature: float,
    ) -> Tensor:
        need_z, need_v, need_g = ctx.needs_input_grad[:3]
        norm = None if weight_v is None or weight_g is None else weight_v.norm(dim=1)  # [K]
        scale = None if norm is None or weight_g is None else weight_g.squeeze(1) / norm
        factor = 1 / temperature if scale is None else scale / temperature
        grad_z = torch.empty_like(z) if need_z else None
        # The gradient of the prototypes themselves; those of v and g follow from it.
        grad_rows = (
            torch.empty_like(weight_v) if weight_v is not None and (need_v or need_g) else None
        )
        total = z.new_zeros(())
        for index, part in enumerate(_chunks(*targets.shape[1:], views=len(z))):
            z_n, target = z[part], targets[part if len(targets) > 1 else (slice(None), part[1])]
            # [v, n, K]
            logits = z_n * factor if weight_v is None else (z_n @ weight_v.T).mul_(factor)
            slope, normalizer = softmax_and_normalizer(logits)
            total += count * normalizer.sum() - torch.linalg.vecdot(target, logits).sum()
            slope.mul_(count).sub_(target)  # d total / d logits
            if grad_rows is not None:
                before = 1 if index else 0
                slope_n, alpha = slope.flatten(0, 1), 1 / temperature
                grad_rows.addmm_(slope_n.T, z_n.flatten(0, 1), beta=before, alpha=alpha)
            if grad_z is not None:
                slope.mul_(factor)
                grad_z[part] = slope if weight_v is None else slope @ weight_v
        grad_g = None
        if not (grad_rows is None or weight_v is None or scale is None or norm is None):
            grad_g = _split_gradient(grad_rows, weight_v, scale, norm)
        ctx.gradients = (
            grad_z,
            grad_rows if need_v else None,
            grad_g[:, None] if need_g and grad_g is not None else None,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (g,) = upstream
        gradients = tuple(None if grad is None else grad.mul_(g) for grad in ctx.gradients)
        ctx.gradients = None  # scaled in place: this backward runs once
        return (*gradients, None, None, None)


def _split_gradient(
    grad_rows: Float[Tensor, "K E"],
    weight_v: Float[Tensor, "K E"],
    scale: Float[Tensor, " K"],
    norm: Float[Tensor, " K"],
) -> Float[Tensor, " K"]:
    """From the gradient of the prototypes g v / |v| to that of v, in place, and that of g.

    The part of v's gradient along v cannot change its direction and is taken away.
    """
    along = []
    on_cpu = weight_v.device.type == "cpu"
    size = max(1, CACHED_ELEMENTS // weight_v.shape[1]) if on_cpu else len(weight_v)
    for rows, v, ratio, length in zip(
        *(tensor.split(size) for tensor in (grad_rows, weight_v, scale, norm)), strict=True
    ):
        along.append(torch.linalg.vecdot(rows, v).div_(length))
        rows.mul_(ratio[:, None]).addcmul_(v, (ratio * along[-1] / length)[:, None], value=-1)
    return torch.cat(along)


def _chunks(batch: int, prototypes: int, *, views: int) -> list[tuple[slice, slice]]:
    """Views and rows of [views, batch] that go together: several whole views, or part of one.

    Few large products with the prototypes: a thin one reads all of them for a handful of rows.
    """
    rows = max(1, CHUNK_ELEMENTS // prototypes)
    together = max(1, rows // batch)
    return [
        (slice(view, view + together), slice(start, start + rows))
        for view, start in product(range(0, views, together), range(0, batch, rows))
    ]


def softmax_and_normalizer(
    logits: Float[Tensor, "*rows K"],
) -> tuple[Tensor, Float[Tensor, "*rows"]]:
    """Softmax and logsumexp of each row from one pass of exponentials.

    At the largest logit the probability is at least 1 / K, so its logarithm is safe, and
    logsumexp = largest logit - log of its probability.
    """
    probabilities = logits.softmax(dim=-1)
    largest, where = logits.max(dim=-1, keepdim=True)
    normalizer = largest - probabilities.gather(-1, where).log()
    return probabilities, normalizer.squeeze(-1)


def entropy(probabilities: Float[Tensor, "*rows K"]) -> Float[Tensor, ""]:
    """Mean entropy of the rows in nats (h of equation 5); 0 log 0 counts as 0."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
