"""The losses, in the form that separates over student views (paper section 3.1, appendix B).

With q_a the target of teacher view a and s_v the logits of student view v over the student
temperature, the loss is the mean over images and pairs (a, v), v != a, of the cross-entropy
H(q_a, softmax(s_v)). (Equation 3 sums over the pairs; the published code, and so its learning
rates, average.) For one view v, summed over its n_v teacher views, that is

    n_v * logsumexp(s_v) - <t_v, s_v>,    t_v = sum of q_a over a != v,

with the gradient n_v * softmax(s_v) - t_v for s_v. So the term of a view depends on no other
student view: views can be streamed, split and accumulated in any way with the same result, and
logits are stored only in chunks (`prototype_cross_entropy`).

The other losses of section 5.1 compare l2-normalised outputs and separate in the same way: the
squared distance (`unit_distance`), and InfoNCE (`info_nce`), whose negatives are those of earlier
steps.

Shapes: V student views, B batch, S pixels a side, K prototypes, E size of the bottleneck, n teacher
views to compare with, Q negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.distillation.network import Network
from dino.models.backbone import has_batch_norm
from dino.runtime import full_precision

CHUNK_ELEMENTS = 2**24
"""Logits computed at a time (64 MiB of fp32): large enough for full speed, small beside a ViT."""

CACHED_ELEMENTS = 2**18
"""Elements of the prototypes' gradient processed together in the cache of a CPU."""


LossKind = Literal["cross_entropy", "mse", "contrastive"]


@dataclass(frozen=True)
class StudentViews:
    """Equally large views for the student, and their targets.

    Attributes:
        images: normalised.
        targets: t_v, of each view or (first axis 1) common to all.
        count: n_v, the number of distributions summed in each row of `targets`.
        drop_path_scale: the factors of drop path; None for no drop path.
        patches: those that the student processes; None for all.
        is_global: whether they are global views, whose features the regulariser spreads.
        keys: the single targets whose sum `targets` is, for the contrastive loss.
        negatives: of the contrastive loss.
    """

    images: Float[Tensor, "V B C S S"]
    targets: Float[Tensor, "v B K"]
    count: int
    drop_path_scale: Float[Tensor, "branches V B"] | None = None
    patches: Int[Tensor, "V B k"] | None = None
    is_global: bool = False
    keys: Float[Tensor, "v n B K"] | None = None
    negatives: Float[Tensor, "Q K"] | None = None


class StudentLoss(nn.Module):
    """The student and its loss, the module inside DistributedDataParallel.

    Args:
        student: the network to train.
        temperature: tau_s, or that of the contrastive loss.
        kind: cross_entropy of distributions; mse or contrastive of l2-normalised outputs.
        koleo: weight of the KoLeo regulariser (`koleo`); 0 for none.

    Attributes:
        divisor: pairs of views times images of this rank, set for each batch: the terms are then
            means over both, and those of groups and micro-batches add up.
    """

    def __init__(
        self,
        student: Network,
        *,
        temperature: float = 0.1,
        kind: LossKind = "cross_entropy",
        koleo: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.temperature, self.divisor = student, temperature, 1
        self.kind: LossKind = kind
        self.koleo = koleo

    @property
    def needs_full_batch(self) -> str:
        """What relates the images of a batch to each other; empty if micro-batches are exact."""
        return "batch norm" if has_batch_norm(self.student) else "KoLeo" if self.koleo else ""

    def forward(
        self, groups: Sequence[StudentViews], frozen: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by name; their sum is minimised.

        Args:
            groups: views of equal size together; the head processes all groups in one batch, which
                matters only for batch norm.
            frozen: whether the backbone gets no gradient and stores no activations.
        """
        head = self.student.head
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            features = [
                self.student.features(v.images, v.drop_path_scale, v.patches) for v in groups
            ]
        with full_precision(features[0].device):
            flat = [rows.flatten(0, 1) for rows in features]
            z = head.embed(torch.cat(flat), self.student.predictor)
            if self.kind != "cross_entropy":
                z = nn.functional.normalize(self.student.output(z), dim=1)
            total = z.new_zeros(())
            terms = {}
            parts = zip(features, z.split([*map(len, flat)]), groups, strict=True)
            for feature, rows, views in parts:
                total = total + self._term(rows.unflatten(0, views.images.shape[:2]), views)
                if self.koleo and views.is_global:
                    terms["koleo"] = self.koleo * koleo(feature)
        return {self.kind: total / self.divisor, **terms}

    def _term(self, z: Float[Tensor, "V B E"], views: StudentViews) -> Float[Tensor, ""]:
        """The loss of one group, summed over pairs of views and images."""
        if self.kind == "mse":
            return unit_distance(z, views.targets, views.count)
        if self.kind == "contrastive":
            assert views.keys is not None, "the targets are a `KeyQueue`"
            assert views.negatives is not None
            return info_nce(z, views.keys, views.negatives, self.temperature)
        layer = self.student.head.last_layer
        return prototype_cross_entropy(
            z, layer.weight_v, layer.weight_g, views.targets, views.count, self.temperature
        )


def unit_distance(
    outputs: Float[Tensor, "V B K"], targets: Float[Tensor, "v B K"], count: int
) -> Float[Tensor, ""]:
    """Sum over pairs of views and rows of |s - q|^2 = 2 - 2 <s, q>, for vectors of length 1.

    Appendix B: "MSE between l2-normalised outputs", in BYOL's scale, which sums over the K numbers.

    Args:
        outputs: of the student.
        targets: the sum of the `count` vectors q that each output is compared with.
        count: n_v.
    """
    pairs = 2 * count * outputs.shape[0] * outputs.shape[1]
    return pairs - 2 * (outputs * targets).sum()


def info_nce(
    queries: Float[Tensor, "V B K"],
    keys: Float[Tensor, "v n B K"],
    negatives: Float[Tensor, "Q K"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Sum over pairs and rows of -log(e^(s k) / (e^(s k) + sum of e^(s negative))), over tau.

    MoCo's loss (arXiv 1911.05722, equation 1): each key is the positive of its own pair.
    """
    positive = (queries[:, None] * keys).sum(dim=-1) / temperature  # [V, n, B]
    others = (queries @ negatives.T / temperature).logsumexp(dim=-1)[:, None]  # [V, 1, B]
    return (torch.logaddexp(positive, others) - positive).sum()


def koleo(features: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
    """The Kozachenko-Leonenko regulariser: it moves each feature away from its nearest neighbour.

    The mean over views and images of -log |x_i - x_j|, x_j the nearest to x_i of the l2-normalised
    features of the same view (arXiv 1806.03198; DINOv2, arXiv 2304.07193, section 4).
    """
    x = nn.functional.normalize(features, dim=-1)
    with torch.no_grad():
        similarity = x @ x.mT
        similarity.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = similarity.argmax(dim=-1)
    neighbours = x.take_along_dim(nearest[..., None], dim=1)
    return -((x - neighbours).norm(dim=-1) + 1e-8).log().mean()


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

    Logits, softmax and gradient exist for `CHUNK_ELEMENTS` at a time; the gradient is computed in
    the forward pass.

    Args:
        z: output of the bottleneck.
        weight_v: the prototypes, or with `weight_g` their directions.
        weight_g: norms of the prototypes; None for no weight norm.
        targets: t_v, of each view or (first axis 1) common to all.
        count: n_v, the number of distributions summed in each row of `targets`.
        temperature: tau_s.
    """
    return _PrototypeCrossEntropy.apply(z, weight_v, weight_g, targets, count, temperature)


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
        # The gradient of the prototypes, from which those of v and g are computed.
        grad_rows = torch.empty_like(weight_v) if need_v or need_g else None
        total, targets = z.new_zeros(()), targets.expand(len(z), -1, -1)
        for index, (views, rows) in enumerate(_chunks(*targets.shape)):
            z_n, target = z[views, rows], targets[views, rows]
            logits = (z_n @ weight_v.T).mul_(factor)  # [v, n, K]
            slope, normalizer = softmax_and_normalizer(logits)
            total += count * normalizer.sum() - torch.linalg.vecdot(target, logits).sum()
            slope.mul_(count).sub_(target)  # d total / d logits
            if grad_rows is not None:
                slope_n, beta, alpha = slope.flatten(0, 1), min(index, 1), 1 / temperature
                grad_rows.addmm_(slope_n.T, z_n.flatten(0, 1), beta=beta, alpha=alpha)
            if grad_z is not None:
                slope.mul_(factor)
                grad_z[views, rows] = slope @ weight_v
        grad_g = None
        if not (grad_rows is None or scale is None or norm is None):
            grad_g = _split_gradient(grad_rows, weight_v, scale, norm)
        ctx.gradients = (grad_z, grad_rows if need_v else None, grad_g if need_g else None)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradients = [None if grad is None else grad.mul_(upstream) for grad in ctx.gradients]
        ctx.gradients = None  # scaled in place: this backward runs once
        return (*gradients, None, None, None)


def _split_gradient(
    grad_rows: Float[Tensor, "K E"],
    weight_v: Float[Tensor, "K E"],
    scale: Float[Tensor, " K"],
    norm: Float[Tensor, " K"],
) -> Float[Tensor, "K 1"]:
    """Turn the gradient of the prototypes g v / |v| into that of v, in place; return that of g."""
    along = []
    on_cpu = weight_v.device.type == "cpu"
    size = max(1, CACHED_ELEMENTS // weight_v.shape[1]) if on_cpu else len(weight_v)
    for rows, v, ratio, length in zip(
        *(tensor.split(size) for tensor in (grad_rows, weight_v, scale, norm)), strict=True
    ):
        along.append(torch.linalg.vecdot(rows, v).div_(length))
        rows.mul_(ratio[:, None]).addcmul_(v, (ratio * along[-1] / length)[:, None], value=-1)
    return torch.cat(along)[:, None]


def _chunks(views: int, batch: int, prototypes: int) -> list[tuple[slice, slice]]:
    """Slices of [views, batch] for large products: several full views, or rows of one."""
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

    logsumexp = largest logit - log of its probability, which is at least 1 / K.
    """
    probabilities = logits.softmax(dim=-1)
    largest, where = logits.max(dim=-1, keepdim=True)
    normalizer = largest - probabilities.gather(-1, where).log()
    return probabilities, normalizer.squeeze(-1)
