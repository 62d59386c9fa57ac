"""Average precision against hand-made numbers and the oracle; rankings exact in any tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle.ranking import walked

from dino.evaluate.retrieval.ranking_metrics import (
    average_precision,
    positions,
    precision_at,
    rankings,
    summarize,
)


@pytest.mark.parametrize(
    ("ranks", "positives", "expected"),
    [
        ([0, 2], 2, 0.5 + (1 / 2 + 2 / 3) / 4),
        ([1], 1, 0.25),
        ([0], 1, 1.0),
        ([3], 1, 0.125),
        ([0, 1, 5], 4, 0.6125),
        ([], 1, 0.0),
    ],
)
def test_average_precision(ranks: list[int], positives: int, expected: float) -> None:
    assert average_precision(ranks, positives) == pytest.approx(expected, rel=1e-12)


def test_precision_stops_at_the_last_positive() -> None:
    assert precision_at([0, 1], 10) == 1.0
    assert precision_at([0, 3], 10) == 0.5
    assert precision_at([0, 3], 2) == 0.5
    assert precision_at([4], 1) == 0.0


def test_junk_leaves_the_ranking() -> None:
    ranking = np.array([7, 3, 5, 0, 1])
    assert positions(ranking, [3, 1], [7, 0]) == [0, 2]
    assert positions(ranking, [3, 1], []) == [1, 4]
    assert positions(ranking, [], [7]) == []


def test_queries_without_positives_do_not_count() -> None:
    summary = summarize([[0], [], [1]])
    assert (summary["map"], summary["mp"]["1"], summary["queries"]) == (62.5, 50, 2)
    assert summary["ap"] == [100, None, 25]
    nothing = summarize([[], []])
    assert math.isnan(nothing["map"])
    assert nothing["queries"] == 0


@given(
    ranking=st.permutations(range(9)),
    roles=st.lists(st.sampled_from("pjn"), min_size=9, max_size=9),
)
def test_equals_the_oracle(ranking: list[int], roles: list[str]) -> None:
    positives = {i for i, role in enumerate(roles) if role == "p"}
    junk = {i for i, role in enumerate(roles) if role == "j"}
    expected = walked(ranking, positives, junk, [1, 5, 10])
    summary = summarize([positions(np.array(ranking), positives, junk)])
    if expected is None:
        assert summary["ap"] == [None]
        return
    assert summary["map"] == pytest.approx(100 * expected[0], rel=1e-12)
    found = [value / 100 for value in summary["mp"].values()]
    assert found == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("limit", [1, 40, 10**6])
@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_rankings_do_not_depend_on_tiles(limit: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Integers: many equal similarities, whose order must be that of the database.
    queries = torch.randint(-1, 2, (5, 4), generator=generator).double()
    database = torch.randint(-1, 2, (20, 4), generator=generator).double()
    found = list(rankings(queries, database, limit=limit, tile=tile))
    assert len(found) == 5
    lengths = database.norm(dim=1).clamp(min=1e-12)
    for query, ranking in zip(queries, found, strict=True):
        scores = (database / lengths[:, None]) @ (query / query.norm().clamp(min=1e-12))
        rounded = scores.round(decimals=9).tolist()
        assert sorted(ranking.tolist()) == list(range(20))
        ordered = [rounded[i] for i in ranking]
        assert ordered == sorted(rounded, reverse=True)


def test_equal_images_keep_their_order() -> None:
    (ranking,) = rankings(torch.ones(1, 2), torch.ones(5000, 2), tile=2000)
    assert ranking.tolist() == list(range(5000))
