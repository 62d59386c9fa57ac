"""Retrieval against the reference's numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from golden_set import read

from dino.evaluate.ranking import average_precision, positions, summarize

JUDGED = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@pytest.mark.parametrize("difficulty", JUDGED)
def test_golden_mean_average_precision(difficulty: str) -> None:
    golden = read("retrieval.json")
    expected = golden["expected"][difficulty]
    right, left_out = JUDGED[difficulty]
    ranks = [
        positions(
            ranking,
            [image for kind in right for image in truth[kind]],
            [image for kind in left_out for image in truth[kind]],
        )
        for ranking, truth in zip(np.array(golden["ranks"]).T, golden["gnd"], strict=True)
    ]
    ours = summarize(ranks)
    assert ours.map == pytest.approx(expected["map"], rel=1e-9)
    assert list(ours.at.values()) == pytest.approx(expected["mean_precision_at_1_5_10"], rel=1e-9)
    for ap, reference in zip(ours.aps, expected["aps"], strict=True):
        assert ap == (None if reference is None else pytest.approx(reference, rel=1e-9))


def test_golden_average_precision_of_copies() -> None:
    for case in read("copy.json"):
        ours = average_precision(case["ranks"], case["positives"])
        assert ours == pytest.approx(case["ap"], rel=1e-9)
