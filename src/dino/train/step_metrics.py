"""The measures of the steps, gathered from one line of `metrics.jsonl` to the next."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dino.distillation.collapse import effective_rank, feature_spread
from dino.distillation.schedules import Schedules
from dino.distillation.step import StepReport


class StepMetrics:
    """Means and rates of the steps since the last line.

    Args:
        schedules: of the run.
        batch: images of a step, over all ranks.
    """

    def __init__(self, schedules: Schedules, batch: int) -> None:
        self.schedules, self.batch = schedules, batch
        self._start()

    def _start(self) -> None:
        self._steps, self._waited = 0, 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the body as waiting for images."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the body, which is not training, out of the rates."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def add(self, measures: dict[str, float]) -> None:
        """Add the measures of a step, such as its loss in nats, whose means are reported."""
        self._steps += 1
        for name, value in measures.items():
            self._sums[name] += value

    def line(self, step: int, report: StepReport) -> dict[str, Any]:
        """The line of metrics of step `step` (0-based), with means since the line before.

        Several terms of the loss stand under their names, as they were in this step.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {
            "step": step + 1,
            "epoch": (step + 1) / self.schedules.steps_per_epoch,
            **{name: total / self._steps for name, total in self._sums.items()},
            "images_per_s": self._steps * self.batch / elapsed,
            "data_wait": min(1.0, self._waited / elapsed),
            "feature_std": feature_spread(report.features).item(),
            "effective_rank": effective_rank(report.features).item(),
            "lr": self.schedules.lr_at(step),
            "weight_decay": self.schedules.weight_decay_at(step),
            "momentum": self.schedules.momentum_at(step),
            "teacher_temp": self.schedules.temperature_at(step),
        }
        if len(report.terms) > 1:
            line |= {name: term.item() for name, term in report.terms.items()}
        self._start()
        return line
