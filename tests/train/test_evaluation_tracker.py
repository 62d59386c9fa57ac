"""What counts as a fall below the start, and what is stored of the evaluations."""

from __future__ import annotations

import pytest

from dino.models.backbone import Backbone
from dino.train.checkpoint import RunState
from dino.train.evaluation_tracker import EvaluationTracker


class Fixed:
    name = "knn"

    def __init__(self, queries: int, **measures: float) -> None:
        self.num_queries = self.num_images = queries
        self.measures = measures

    def run(self, backbone: Backbone) -> dict[str, float]:
        return self.measures


@pytest.mark.parametrize(
    ("queries", "now", "fall"),
    [
        (1_000_000, 50.0, 0.0),
        (1_000_000, 49.1, 0.0),  # within a point, however many images
        (1_000_000, 48.9, 1.1),
        (2_500, 48.1, 0.0),  # two standard errors of one half among 2,500 are 2 points
        (2_500, 47.9, 2.1),
        (100, 41.0, 0.0),
        (100, 39.0, 11.0),
        (100, 90.0, 0.0),
    ],
)
def test_a_fall_is_more_than_chance(queries: int, now: float, fall: float) -> None:
    state = RunState(0, measured={"k10": now - 3, "k20": now}, start=50.0)
    tracker = EvaluationTracker([Fixed(queries)], state)
    assert tracker.fall() == pytest.approx(fall)
    state.start = None  # not started from weights
    assert tracker.fall() == 0.0


def test_the_best_is_stored() -> None:
    state = RunState(0)
    tracker = EvaluationTracker([], state)
    found = []
    for value in (3.0, 2.0, 4.0):
        state.measured = {"k10": value}
        found.append(tracker.improved())
    assert found == [True, False, True]
    assert state.best == 4.0
    state.measured = {}
    assert not tracker.improved()


def test_measures_that_are_not_finite_are_left_out() -> None:
    state = RunState(0)
    tracker = EvaluationTracker([Fixed(1, k10=float("nan"), k20=3.0)], state)
    tracker.measure(backbone=None)  # type: ignore[arg-type]
    assert state.measured == {"k20": 3.0}
    tracker.evaluations = [Fixed(1, k10=float("nan"))]
    tracker.measure(backbone=None)  # type: ignore[arg-type]
    assert tracker.leading is None
