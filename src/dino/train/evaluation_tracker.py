"""Evaluations during training: the newest, the best, and whether one fell below the start.

Users who continued from released weights saw their accuracy go down and found out at the end
(facebookresearch/dino#207). A run that starts from weights is therefore measured before its first
step, and every later measure is compared with that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dino.evaluate.protocol import Evaluation
from dino.models.backbone import Backbone
from dino.train.checkpoint import RunState

LEAST = 1.0
"""Points below the start that are never called a fall."""


@dataclass
class EvaluationTracker:
    """The evaluations of a run.

    Attributes:
        evaluations: what is measured.
        measured: the newest measures, in percent.
        best: the best so far; of several measures the largest counts.
        start: what the network had before the first step of a run that starts from weights.
    """

    evaluations: Sequence[Evaluation]
    measured: dict[str, float] = field(default_factory=dict)
    best: float = -math.inf
    start: float | None = None

    def state(self, step: int, refused: int) -> RunState:
        """The counters of a checkpoint."""
        best = self.best if math.isfinite(self.best) else None
        return RunState(step, refused, self.measured, best, self.start)

    def restore(self, state: RunState) -> None:
        """The inverse of `state`."""
        self.measured, self.start = state.measured, state.start
        self.best = -math.inf if state.best is None else state.best

    def measure(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """The measures of every evaluation, by its name."""
        found = {evaluation.name: evaluation.run(backbone) for evaluation in self.evaluations}
        newest = list(found.values())[-1] if found else {}
        self.measured = {name: value for name, value in newest.items() if math.isfinite(value)}
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

        More than chance are one point and two standard errors of a share among the queries,
        100 sqrt(p (1 - p) / n). The queries are the same every time, so that the difference of
        two measures varies less than one of them does between samples.
        """
        if self.start is None or not self.measured:
            return 0.0
        share, queries = self.start / 100, self.evaluations[-1].num_queries
        noise = 200 * math.sqrt(max(share * (1 - share), 0.0) / max(queries, 1))
        fallen = self.start - self.leading
        return fallen if fallen > max(LEAST, noise) else 0.0
