"""The verdict: collapses, bands, what is too early to judge, and what labels say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dino.show.report.run_contents import Run
from dino.show.report.verdict import LINES, Verdict, judge

LIMIT = math.log(1024)
HEALTHY = {
    "teacher_entropy": 0.4 * LIMIT,
    "kl": 0.08 * LIMIT,
    "feature_std": 0.8,
    "effective_rank": 15.0,
}


def verdict(
    folder: Path, *lines: dict[str, Any], batch: int = 64, knn: dict[str, Any] | None = None
) -> Verdict | None:
    defining = {"head.prototypes": 1024, "run.batch": batch}
    config = {"about": {}, "defining": defining, "total_steps": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if knn:
        (folder / "results.json").write_text(json.dumps({"knn": knn}))
    return judge(Run(folder))


def status(found: Verdict | None) -> tuple[str, str]:
    assert found is not None
    return found.status, found.words


def test_nothing_is_judged_before_anything_is_measured(tmp_path: Path) -> None:
    assert verdict(tmp_path) is None


def test_without_labels(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"step": 1000, **HEALTHY})
    assert status(found) == ("healthy", "healthy")
    assert found is not None
    assert "cannot be measured without labels" in found.sentences[0]
    assert len(found.readings) == 4
    assert status(verdict(tmp_path, {"step": 500, **HEALTHY})) == ("healthy", "healthy so far")


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({"teacher_entropy": 0.98 * LIMIT}, "doubtful", "the targets are almost uniform"),
        ({"teacher_entropy": 0.995 * LIMIT}, "failed", "the targets are almost uniform"),
        ({"teacher_entropy": 0.02 * LIMIT}, "doubtful", "the same prototype"),
        ({"teacher_entropy": 0.007 * LIMIT}, "failed", "the same prototype"),
        ({"kl": 0.001 * LIMIT}, "doubtful", "nothing left to learn"),
        ({"feature_std": 0.2}, "doubtful", "almost equal"),
        ({"feature_std": 0.02}, "failed", "almost equal"),
        ({"effective_rank": 4.0}, "doubtful", "few directions"),
        ({"effective_rank": 1.1}, "failed", "few directions"),
    ],
)
def test_each_measure_can_spoil_it(
    tmp_path: Path, change: dict[str, float], expected: str, words: str
) -> None:
    found = verdict(tmp_path, {"step": 500, **HEALTHY, **change})
    assert status(found)[0] == expected
    assert found is not None
    assert words in found.sentences[0]
    assert [reading.status for reading in found.readings].count(expected) == 1
    advice = "teacher_entropy" in change and expected == "failed"
    assert ("ollapse" in found.sentences[-1]) == advice
    early = verdict(tmp_path, {"step": 50, **HEALTHY, **change})
    assert status(early) == ("open", "too early to tell")


def test_the_rank_of_a_small_batch_is_not_judged(tmp_path: Path) -> None:
    line = {"step": 500, **HEALTHY, "effective_rank": 1.1}
    assert status(verdict(tmp_path, line, batch=32))[0] == "failed"
    found = verdict(tmp_path, line, batch=8)
    assert status(found) == ("healthy", "healthy so far")
    assert found is not None
    assert found.readings[3].status == "open"


def test_the_newest_lines_count_and_their_mean(tmp_path: Path) -> None:
    bad = {**HEALTHY, "feature_std": 0.02}
    lines = [{"step": step, **bad} for step in range(100, 200)]
    lines += [{"step": step, **HEALTHY} for step in range(200, 200 + LINES)]
    assert status(verdict(tmp_path, *lines))[0] == "healthy"
    lines[-1] = {"step": 300, **bad}  # one batch of duplicates
    assert status(verdict(tmp_path, *lines))[0] == "healthy"


@pytest.mark.parametrize(
    ("kind", "advice"), [("uniform", "ln K = 6.93"), ("one prototype", "center momentum")]
)
def test_a_collapse_is_named_with_a_remedy(tmp_path: Path, kind: str, advice: str) -> None:
    lines = [{"step": 30, "collapse": kind}, {"step": 1000, **HEALTHY}]
    found = verdict(tmp_path, *lines)
    assert status(found) == ("failed", "collapsed")
    assert found is not None
    assert f"At step 30 the run collapsed: {kind}" in found.sentences[0]
    assert advice in found.sentences[1]


KNN = {"trained": 74.1, "untrained": 59.9, "pixels": 26.7, "k": 20, "bank": 1728, "queries": 576}


def test_with_labels_the_lead_decides(tmp_path: Path) -> None:
    lines = [{"step": 1000, **HEALTHY}, {"step": 1000, "knn": {"k20": 74.1}}]
    found = verdict(tmp_path, *lines, knn=KNN)
    assert status(found) == ("healthy", "good")
    assert found is not None
    assert [reading.value for reading in found.readings[4:]] == [
        "+14.2 \u00b1 5.5 points",
        "+47.4 \u00b1 5.2 points",
    ]
    for other in ("untrained", "pixels"):
        doubtful = verdict(tmp_path, *lines, knn={**KNN, other: 73.0})
        assert status(doubtful) == ("doubtful", "doubtful")
        assert doubtful is not None
        assert "no better than" in doubtful.sentences[0]
    few = verdict(tmp_path, *lines, knn={**KNN, "queries": 40})  # may be chance
    assert status(few) == ("doubtful", "doubtful")


def test_k_nn_on_the_way(tmp_path: Path) -> None:
    def curve(*values: float) -> list[dict[str, Any]]:
        points = [{"step": 100 * n, "knn": {"k20": v}} for n, v in enumerate(values, start=1)]
        return [*points, {"step": 500, **HEALTHY}]

    assert status(verdict(tmp_path, *curve(50, 40, 60))) == ("healthy", "healthy so far")
    falling = verdict(tmp_path, *curve(50, 40))
    assert status(falling) == ("doubtful", "doubtful so far")
    assert falling is not None
    assert "became worse" in falling.sentences[0]
