"""Evaluations on the way: what the teacher reached, its best, and whether it fell below its start.

Users who continued from released weights saw their accuracy go down and found out at the end
(facebookresearch/dino#207). A run that starts from weights is therefore measured before its first
step, and every later measure is held against that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dino.evaluate.protocol import Evaluation
from dino.models.backbone import Backbone

LEAST = 1.0
"""Points below the start that are never called a fall."""


@dataclass
class Watch:
    """The evaluations of a run.

    Attributes:
        evaluations: what is measured.
        measured: the newest measures, in percent.
        best: the best there was; of several measures the largest counts.
        start: what the network had before the first step of a run that starts from weights.
    """

    evaluations: Sequence[Evaluation]
    measured: dict[str, float] = field(default_factory=dict)
    best: float = -math.inf
    start: float | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        best = self.best if self.measured else None
        return {"measured": self.measured, "best": best, "start": self.start}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.measured, self.start = state["measured"], state.get("start")
        self.best = state["best"] if self.measured else self.best

    def measure(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """The measures of every evaluation, by its name."""
        found = {evaluation.name: evaluation.run(backbone) for evaluation in self.evaluations}
        self.measured = list(found.values())[-1] if found else {}
        return found

    @property
    def leading(self) -> float:
        """The largest of the newest measures."""
        return max(self.measured.values(), default=-math.inf)

    def improved(self) -> bool:
        """Whether the newest measure is the best so far, which it then becomes."""
        better = self.leading > self.best
        self.best = max(self.best, self.leading)
        return better

    def fall(self) -> float:
        """Points by which the newest measure lies below the start; 0 if that may be chance.

        More than chance are one point and two standard errors of a share among the images asked,
        100 sqrt(p (1 - p) / n). The same images are asked every time, so that the difference of
        two measures varies less than one of them does between samples.
        """
        if self.start is None or not self.measured:
            return 0.0
        share, asked = self.start / 100, self.evaluations[-1].asked
        noise = 200 * math.sqrt(max(share * (1 - share), 0.0) / max(asked, 1))
        fallen = self.start - self.leading
        return fallen if fallen > max(LEAST, noise) else 0.0
