"""What counts as a fall below the start, and what is kept of the evaluations."""

from __future__ import annotations

import pytest

from dino.models.backbone import Backbone
from dino.train.evaluation_tracker import EvaluationTracker


class Fixed:
    name = "knn"

    def __init__(self, num_queries: int) -> None:
        self.num_queries = num_queries

    def run(self, backbone: Backbone) -> dict[str, float]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("num_queries", "now", "fall"),
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
def test_a_fall_is_more_than_chance(num_queries: int, now: float, fall: float) -> None:
    tracker = EvaluationTracker(
        [Fixed(num_queries)], measured={"k10": now - 3, "k20": now}, start=50.0
    )
    assert tracker.fall() == pytest.approx(fall)
    assert (
        EvaluationTracker([Fixed(num_queries)], measured={"k20": now}).fall() == 0.0
    )  # did not begin with weights


def test_the_best_is_kept_and_survives_a_checkpoint() -> None:
    tracker = EvaluationTracker([Fixed(1)])
    found = []
    for value in (3.0, 2.0, 4.0):
        tracker.measured = {"k10": value}
        found.append(tracker.improved())
    assert found == [True, False, True]
    tracker.start = 3.0
    again = EvaluationTracker([Fixed(1)])
    again.restore(tracker.state(step=7, refused=2))
    assert (again.measured, again.best, again.start) == ({"k10": 4.0}, 4.0, 3.0)
    assert tracker.state(7, 2) == again.state(7, 2)
    again.restore(EvaluationTracker([]).state(0, 0))
    assert again.start is None
    assert again.improved() is False


def test_measures_that_are_not_finite_are_left_out() -> None:
    class Broken(Fixed):
        def run(self, backbone: Backbone) -> dict[str, float]:
            return {"k10": float("nan"), "k20": 3.0}

    tracker = EvaluationTracker([Broken(1)])
    tracker.measure(backbone=None)  # type: ignore[arg-type]
    assert tracker.measured == {"k20": 3.0}
