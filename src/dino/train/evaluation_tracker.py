"""Evaluations during training: the newest, the best, and whether one fell below the start.

Users who continued from released weights saw their accuracy go down and found out at the end
(facebookresearch/dino#207). A run that starts from weights is therefore measured before its first
step, and every later measure is compared with that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dino.evaluate.protocol import Evaluation
from dino.models.backbone import Backbone
from dino.train.checkpoint import RunState

MIN_FALL = 1.0
"""Points below the start that are never reported."""


@dataclass
class EvaluationTracker:
    """The evaluations of a run.

    Attributes:
        evaluations: what is measured.
        state: of the run; its `measured`, `best` and `start` are set here.
    """

    evaluations: Sequence[Evaluation]
    state: RunState

    def measure(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """The measures of every evaluation, by its name."""
        found = {evaluation.name: evaluation.run(backbone) for evaluation in self.evaluations}
        newest = list(found.values())[-1] if found else {}
        self.state.measured = {n: value for n, value in newest.items() if math.isfinite(value)}
        return found

    @property
    def leading(self) -> float | None:
        """The largest of the newest measures."""
        return max(self.state.measured.values(), default=None)

    def improved(self) -> bool:
        """Whether the newest measure is the best so far, which it then becomes."""
        leading, best = self.leading, self.state.best
        if leading is None or (best is not None and leading <= best):
            return False
        self.state.best = leading
        return True

    def fall(self) -> float:
        """Points by which the newest measure lies below the start; 0 if that may be chance.

        More than chance are one point and two standard errors of a share among the queries,
        100 sqrt(p (1 - p) / n). The queries are the same every time, so that the difference of
        two measures varies less than one of them does between samples.
        """
        start, leading = self.state.start, self.leading
        if start is None or leading is None:
            return 0.0
        share, queries = start / 100, self.evaluations[-1].num_queries
        noise = 200 * math.sqrt(max(share * (1 - share), 0.0) / max(queries, 1))
        return start - leading if start - leading > max(MIN_FALL, noise) else 0.0
