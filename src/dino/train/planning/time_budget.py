"""Runs whose duration is a time: how many steps fit into it, from the speed of the last ones.

When the speed changes, so does the number of steps that are left, and the rest of every schedule
is stretched or compressed to it (`Schedules.ending`): it ends when the time does.
"""

from __future__ import annotations

import time
from collections import deque

UNKNOWN = 10**9
"""Total of a run before its speed was measured."""
FITS = 200
"""How often in a run the total is fitted."""
WINDOW = 0.05
"""Share of the time over which the speed is measured."""


class TimeBudget:
    """The time that a run takes, and what is left of it.

    Args:
        seconds: of the entire run, its evaluations included.
        started: when this process began to work for the run, by `time.monotonic`.
        spent: seconds of earlier processes.
    """

    def __init__(self, seconds: float, started: float, spent: float = 0.0) -> None:
        self.seconds = seconds
        self._started, self._evaluated = started - spent, 0.0
        self._steps: deque[tuple[int, float]] = deque()

    @property
    def spent(self) -> float:
        """Seconds of the run until now."""
        return time.monotonic() - self._started

    def evaluated(self, seconds: float) -> None:
        """Leave the seconds of an evaluation out of the speed of the steps."""
        self._evaluated += seconds

    def speed(self, step: int) -> float | None:
        """Seconds of a step, over the last steps before `step`; None at the first call."""
        now = time.monotonic() - self._evaluated
        self._steps.append((step, now))
        while len(self._steps) > 2 and now - self._steps[1][1] >= WINDOW * self.seconds:
            self._steps.popleft()
        first, since = self._steps[0]
        return (now - since) / (step - first) if step > first else None

    def total(self, step: int, step_seconds: float, evaluation_seconds: float) -> int:
        """The number of steps that the run can have, of which `step` are done; one more at least.

        Args:
            step: steps done.
            step_seconds: of each further step.
            evaluation_seconds: of all evaluations that are left.
        """
        left = self.seconds - self.spent - evaluation_seconds
        return step + max(1, int(left / step_seconds))
