"""The loss (paper section 3.1, equations 1 to 5) in the form that separates over student views.

With q_a the target that teacher view a gives and s_v the logits of student view v over the student
temperature, the loss is the mean over the pairs (a, v), v != a, of the cross-entropy
H(q_a, softmax(s_v)). For one view v, summed over its n_v teacher views, that is

    n_v * logsumexp(s_v) - <t_v, s_v>,    t_v = sum of q_a over a != v,

with the gradient n_v * softmax(s_v) - t_v for s_v. So each view's term stands alone once the
targets are known: views can be streamed, split and accumulated in any way with the same result,
and logits need to live only for a moment (`prototype_cross_entropy`).

In naive loops over A teacher views with targets Q and V student views with logits S [V, B, K]:

    loss = 0
    for a in range(A):
        for v in range(V):
            if v != a:
                loss += mean over B of -sum(Q[a] * log_softmax(S[v] / student_temperature))
    loss /= number of pairs

Equation 3 sums over the pairs; the published code, and so its learning rates, average.

Shapes: V student views, B batch, S pixels a side, K prototypes, E size of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.distillation.network import Network
from dino.runtime import full_precision

CHUNK_ELEMENTS = 2**24
"""Logits computed at a time (64 MiB of fp32): large enough for full speed, small beside a ViT."""

CACHED_ELEMENTS = 2**18
"""Elements of the prototypes' gradient finished together while a CPU's cache holds them."""


@dataclass(frozen=True)
class StudentViews:
    """Equally large views for the student, and what it learns from them.

    Attributes:
        images: normalised.
        targets: t_v, of each view or (first axis 1) common to all.
        count: n_v, the number of distributions summed in each row of `targets`.
        drop_path_scale: the factors of drop path; None for no drop path.
    """

    images: Float[Tensor, "V B C S S"]
    targets: Float[Tensor, "v B K"]
    count: int
    drop_path_scale: Float[Tensor, "branches V B"] | None = None


class StudentLoss(nn.Module):
    """The student and its loss: what DistributedDataParallel wraps.

    Args:
        student: the network to train.
        temperature: tau_s.

    Attributes:
        divisor: pairs of views times images of this rank, set for each batch: the terms are then
            means over both, and those of groups and micro-batches add up.
    """

    def __init__(self, student: Network, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.student, self.temperature, self.divisor = student, temperature, 1

    def forward(
        self, groups: Sequence[StudentViews], frozen: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by name; their sum is minimised.

        The head processes the views of all groups in one batch, which matters only if it has batch
        norm; called group by group, the terms add up.

        Args:
            groups: views of equal size together.
            frozen: the backbone gets no gradient, and nothing of its forward pass is stored.
        """
        head = self.student.head
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            features = [self.student.features(v.images, v.drop_path_scale) for v in groups]
        with full_precision(features[0].device):
            z = head.embed(torch.cat([rows.flatten(0, 1) for rows in features]))
            total = z.new_zeros(())
            split = z.split([len(rows) * rows.shape[1] for rows in features])
            for rows, views in zip(split, groups, strict=True):
                total = total + prototype_cross_entropy(
                    rows.unflatten(0, views.images.shape[:2]),
                    head.last_layer.weight_v,
                    head.last_layer.weight_g,
                    views.targets,
                    views.count,
                    self.temperature,
                )
        return {"cross_entropy": total / self.divisor}


def num_pairs(teacher_views: int, student_views: int) -> int:
    """Number of pairs (a, v) with v != a: 2n + 2 for two global and n local views."""
    return teacher_views * (student_views - 1)


def prototype_cross_entropy(
    z: Float[Tensor, "V B E"],
    weight_v: Float[Tensor, "K E"],
    weight_g: Float[Tensor, "K 1"] | None,
    targets: Float[Tensor, "v B K"],
    count: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Sum over views and rows of `count * logsumexp(s) - <t, s>`, s = z @ prototypes.T / tau_s.

    Logits, softmax and gradient live for `CHUNK_ELEMENTS` at a time; the gradient is made in the
    forward pass, while the logits exist.

    Args:
        z: what the prototypes are compared with, V views of B rows.
        weight_v: the prototypes, or their directions.
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
        weight_v: Tensor,
        weight_g: Tensor | None,
        targets: Tensor,
        count: int,
        temperature: float,
    ) -> Tensor:
        need_z, need_v, need_g = ctx.needs_input_grad[:3]
        norm = None if weight_g is None else weight_v.norm(dim=1)  # [K]
        scale = None if norm is None or weight_g is None else weight_g.squeeze(1) / norm
        factor = 1 / temperature if scale is None else scale / temperature
        grad_z = torch.empty_like(z) if need_z else None
        # The gradient of the prototypes themselves; those of v and g follow from it.
        grad_rows = torch.empty_like(weight_v) if need_v or need_g else None
        total = z.new_zeros(())
        for index, part in enumerate(_chunks(*targets.shape[1:], views=len(z))):
            z_n, target = z[part], targets[part if len(targets) > 1 else (slice(None), part[1])]
            # [v, n, K]
            logits = (z_n @ weight_v.T).mul_(factor)
            slope, normalizer = softmax_and_normalizer(logits)
            total += count * normalizer.sum() - torch.linalg.vecdot(target, logits).sum()
            slope.mul_(count).sub_(target)  # d total / d logits
            if grad_rows is not None:
                before = 1 if index else 0
                slope_n, alpha = slope.flatten(0, 1), 1 / temperature
                grad_rows.addmm_(slope_n.T, z_n.flatten(0, 1), beta=before, alpha=alpha)
            if grad_z is not None:
                slope.mul_(factor)
                grad_z[part] = slope @ weight_v
        grad_g = None
        if not (grad_rows is None or scale is None or norm is None):
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
    """Views and rows of [views, batch] that go together: several full views, or part of one.

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
