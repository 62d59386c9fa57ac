"""Is the training healthy? Label-free measures and a monitor that calls a collapse by its name.

Equation 5 splits the loss: H(P_t, P_s) = h(P_t) + KL(P_t || P_s). Section 5.3: both collapses show
as KL -> 0; h -> ln K is the uniform collapse (centering won), h -> 0 the one on a single prototype
(sharpening won).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

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
}
"""What to try, from the authors' answers to users and section 5.3."""


@torch.no_grad()
def feature_spread(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Standard deviation of l2-normalised features times sqrt(D), mean over dimensions.

    1 where the features fill the sphere evenly, 0 where all images have the same feature.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    return unit.std(dim=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Exp of the entropy of the normalised singular values of the centered features (Roy 2007).

    Between 1 (all variation in one direction) and min(N - 1, D).
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    return torch.exp(-torch.xlogy(shares, shares).sum())


@dataclass
class Monitor:
    """Watches teacher entropy and KL for a collapse that lasts.

    A flat target is normal for some steps after the start, so a collapse is called only after
    `patience` steps in a row, and once.

    Args:
        prototypes: K.
        patience: steps in a row that must look collapsed.
    """

    prototypes: int
    patience: int = 200
    called: str | None = None
    _steps: deque[str | None] = field(default_factory=deque)

    def watch(self, teacher_entropy: float, kl: float) -> str | None:
        """Take one step's measures in nats; returns what to tell the user, once a collapse."""
        limit = math.log(self.prototypes)
        look = None
        if kl < 0.01 * limit:
            if teacher_entropy > 0.99 * limit:
                look = "uniform"
            elif teacher_entropy < 0.01 * limit:
                look = "one prototype"
        self._steps.append(look)
        if len(self._steps) > self.patience:
            self._steps.popleft()
        lasting = look is not None and self._steps.count(look) == self.patience
        if not lasting:
            if look is None:
                self.called = None
            return None
        if look == self.called:
            return None
        self.called = look
        return ADVICE[str(look)].format(limit=limit)
