"""Label-free measures of the features, and a monitor that detects and names a collapse.

Equation 5 splits the loss: H(P_t, P_s) = h(P_t) + KL(P_t || P_s). Section 5.3: KL -> 0 in both
collapses; h -> ln K in the uniform one (centering dominates), h -> 0 in that on one prototype
(sharpening dominates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ADVICE = {
    "uniform": (
        "uniform collapse: the teacher's entropy stands at ln K = {limit:.2f}, every image gets "
        "the same flat target. Try a lower teacher temperature (.02 to .04; higher is worse), "
        "prototypes of fixed norm, a longer last-layer freeze, a smaller learning rate, "
        "or fewer prototypes for a small data set"
    ),
    "one prototype": (
        "collapse on one prototype: the teacher's entropy stands at 0, every image gets the same "
        "single prototype. Check that centering is on (center momentum about .9, below .999) and "
        "that the learning rate suits the optimizer (AdamW: about 5e-4 per 256 images); "
        "try a slightly higher teacher temperature (up to .07)"
    ),
    "constant": (
        "constant output: the teacher gives every image the same vector. The squared distance "
        "alone does not prevent that: take centering, or a predictor with batch norm in the head"
    ),
}
"""What to try, from the authors' answers to users and section 5.3."""


@torch.no_grad()
def feature_spread(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Standard deviation of l2-normalised features times sqrt(D), mean over dimensions.

    1 where the features fill the sphere evenly, 0 where all images have the same feature.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    std = unit.std(dim=0, correction=min(1, len(unit) - 1))  # that of a single image is 0
    return std.mean() * features.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Exp of the entropy of the normalised singular values of the centered features (Roy 2007).

    Between 1 (all variation in one direction) and min(N - 1, D).
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    return torch.exp(-torch.xlogy(shares, shares).sum())


@dataclass
class CollapseMonitor:
    """Detects a lasting collapse from the teacher's entropy and the KL divergence.

    Where targets are vectors of length 1, from their spread (`StepReport.target_spread`).

    Flat targets are normal in the first steps, so a collapse is reported once, after `patience`
    consecutive steps.

    Attributes:
        prototypes: K.
        collapse: the present collapse, "uniform", "one prototype" or "constant"; None for none.
    """

    prototypes: int
    patience: int = 200
    collapse: str | None = None
    _kind: str | None = None
    _steps: int = 0

    def update(
        self, teacher_entropy: float, kl: float, target_spread: float = math.nan
    ) -> str | None:
        """Add the measures of a step in nats; returns advice for the user, once a collapse.

        What the loss does not define is NaN.
        """
        limit = math.log(self.prototypes)
        kind = None
        if kl < 0.01 * limit:
            if teacher_entropy > 0.99 * limit:
                kind = "uniform"
            elif teacher_entropy < 0.01 * limit:
                kind = "one prototype"
        if target_spread < 0.01:
            kind = "constant"
        self._steps = self._steps + 1 if kind == self._kind else 1
        self._kind = kind
        if kind is None:
            self.collapse = None
        elif kind != self.collapse and self._steps >= self.patience:
            self.collapse = kind
            return ADVICE[kind].format(limit=limit)
        return None
