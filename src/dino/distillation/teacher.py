"""Student, and the teacher that follows it by an exponential moving average (paper section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.distillation.loss import prototype_cross_entropy
from dino.models.backbone import Backbone
from dino.models.head import Head
from dino.runtime import full_precision


class Network(nn.Module):
    """g = h o f: a backbone and its projection head. Student and teacher are both one."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward_features(
        self, images: Float[Tensor, "V B C S S"], keep: Float[Tensor, "branches V B"] | None = None
    ) -> Float[Tensor, "V B D"]:
        """Features of a group of equally large views, promoted to at least fp32."""
        rows = images.flatten(0, 1)
        features = self.backbone(rows, None if keep is None else keep.flatten(1, 2))
        if features.dtype in (torch.bfloat16, torch.float16):
            features = features.float()
        return features.unflatten(0, images.shape[:2])

    def logits(self, features: Float[Tensor, "V B D"]) -> Float[Tensor, "V B K"]:
        """Logits of every prototype, never in reduced precision."""
        with full_precision(features.device):
            logits: Tensor = self.head(features.flatten(0, 1))
        return logits.unflatten(0, features.shape[:2])

    def forward(
        self,
        groups: Sequence[Float[Tensor, "_ B C _ _"]],
        targets: Sequence[tuple[Float[Tensor, "_ B K"], int]],
        temperature: float,
        keep: Sequence[Float[Tensor, "branches _ B"] | None],
        frozen: bool = False,
    ) -> Float[Tensor, ""]:
        """Sum of the loss terms (see `distillation.loss`) of some groups of student views.

        The head sees the views of all groups at once, which matters only if it has batch norm;
        called group by group, the sums add up.

        Args:
            groups: views of equal size together.
            targets: for each group the target t_v and its count n_v.
            temperature: tau_s.
            keep: for each group the factors of drop path, or None.
            frozen: the backbone gets no gradient, and nothing is kept of its forward pass.
        """
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            features = [self.forward_features(*pair) for pair in zip(groups, keep, strict=True)]
        with full_precision(features[0].device):
            z = self.head.embed(torch.cat([part.flatten(0, 1) for part in features]))
            last = self.head.last_layer
            total = z.new_zeros(())
            parts = z.split([len(part) * part.shape[1] for part in features])
            for rows, part, (target, count) in zip(parts, features, targets, strict=True):
                views = rows.unflatten(0, part.shape[:2])
                total = total + prototype_cross_entropy(
                    views, last.weight_v, last.weight_g, target, count, temperature
                )
        return total


def make_teacher(student: Network) -> Network:
    """A copy of `student` with storage of its own and no gradients, equal at the start.

    It stays in training mode like the published code's: that matters only for batch norm, whose
    statistics are then the batch's, while the teacher keeps running statistics of its own.
    """
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(
    teacher: nn.Module, student: nn.Module, momentum: float, refused: Tensor | None = None
) -> None:
    """theta_t <- momentum * theta_t + (1 - momentum) * theta_s, parameters only, no buffers.

    Args:
        teacher: moved in place.
        student: after its step.
        momentum: lambda, in [0, 1].
        refused: 0-dim bool; where true the teacher stays as it is.
    """
    own: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    weight = torch.full((), 1 - momentum, dtype=own[0].dtype, device=own[0].device)
    if refused is not None:  # decided on the device: no host synchronisation
        weight = torch.where(refused, 0.0, weight)
    torch._foreach_lerp_(own, theirs, [weight] * len(own))
