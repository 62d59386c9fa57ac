"""k-NN against a slow oracle, and in every corner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import knn as oracle
from torch import Tensor

from dino.evaluate.classification.knn_classifier import (
    TEMPERATURE,
    knn,
    standard_error,
    vote,
)
from dino.files import UserError


def clusters(n: int, classes: int, seed: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping clusters, so that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, width, generator=generator)
    return (centers[labels] + 1.5 * noise).double(), labels


def assert_as_oracle(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    k: list[int],
    temperature: float = 0.07,
    leave_one_out: bool = False,
    **tiles: int,
) -> None:
    scores = knn(*bank, *queries, k, temperature, leave_one_out=leave_one_out, **tiles)
    limit = len(bank[0]) - leave_one_out
    assert list(scores) == sorted({min(n, limit) for n in k})
    for n, score in scores.items():
        expected = oracle.knn(
            bank[0].numpy(),
            bank[1].tolist(),
            queries[0].numpy(),
            queries[1].tolist(),
            n,
            temperature,
            leave_one_out,
        )
        assert (score.top1, score.top5) == pytest.approx(expected, abs=1e-9)
        assert score.images == len(queries[1])


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    q=st.integers(1, 10),
    classes=st.integers(1, 9),
    k=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    chunk=st.integers(1, 11),
    tile=st.integers(1, 41),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_oracle(
    n: int,
    q: int,
    classes: int,
    k: list[int],
    temperature: float,
    chunk: int,
    tile: int,
    seed: int,
) -> None:
    bank, queries = clusters(n, classes, seed), clusters(q, classes, seed + 1)
    assert_as_oracle(bank, queries, k, temperature, chunk=chunk, tile=tile)


@settings(deadline=None)
@given(
    n=st.integers(2, 30),
    classes=st.integers(1, 7),
    chunk=st.integers(1, 31),
    tile=st.integers(1, 31),
    seed=st.integers(0, 10**6),
)
def test_leave_one_out_agrees_with_the_oracle(
    n: int, classes: int, chunk: int, tile: int, seed: int
) -> None:
    images = clusters(n, classes, seed)
    assert_as_oracle(images, images, [1, 5, 100], leave_one_out=True, chunk=chunk, tile=tile)


@pytest.mark.parametrize("seed", range(5))
def test_ties_agree_with_the_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.eye(4, dtype=torch.float64)[torch.randint(4, (60,), generator=generator)]
    labels = torch.randint(8, (60,), generator=generator)
    for tile in (7, 60):
        assert_as_oracle((features, labels), (features[:9], labels[:9]), [1, 3, 20], tile=tile)
    assert_as_oracle((features, labels), (features, labels), [1, 3, 20], leave_one_out=True)


def test_more_queries_than_one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino.evaluate.classification.knn_classifier.PANEL", 8)
    images = clusters(30, 4, 0)
    assert_as_oracle(images, clusters(21, 4, 1), [3, 10])
    assert_as_oracle(images, images, [3, 10], leave_one_out=True)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_many_temperatures_at_once_are_each_alone(leave_one_out: bool) -> None:
    bank = clusters(50, 6, 0)
    queries = bank if leave_one_out else clusters(17, 6, 1)
    temperatures, ks = (0.01, 0.07, 2.0), (1, 4, 30)
    votes = vote(*bank, *queries, ks, temperatures, leave_one_out=leave_one_out, chunk=5)
    for t in temperatures:
        alone = knn(*bank, *queries, ks, t, leave_one_out=leave_one_out)
        assert votes.accuracies(t) == alone
        for k, score in alone.items():
            counts = votes.confusion(k, t)
            assert counts.sum(dim=1).tolist() == torch.bincount(queries[1], minlength=6).tolist()
            assert 100 * counts.diagonal().sum().item() / len(queries[0]) == score.top1


def test_the_standard_error_is_that_of_a_binomial_share() -> None:
    """Beside the spread of many draws, and at the ends, where it is 0."""
    generator = np.random.default_rng(0)
    draws = 100 * generator.binomial(200, 0.3, 20_000) / 200
    assert standard_error(30.0, 200) == pytest.approx(draws.std(), rel=0.02)
    assert standard_error(50.0, 100) == 5.0
    assert standard_error(0.0, 9) == standard_error(100.0, 9) == 0.0


def test_equal_votes_go_to_the_lower_label() -> None:
    bank = torch.eye(4, dtype=torch.float64)
    votes = vote(bank, torch.tensor([9, 3, 9, 3]), bank.sum(0)[None], torch.tensor([9]), [4])
    assert votes.classes.tolist() == [3, 9]
    assert votes.confusion(4, TEMPERATURE).tolist() == [[0, 0], [1, 0]]


def test_labels_may_be_any_integers() -> None:
    bank, queries = clusters(40, 4, 0), clusters(11, 4, 1)
    renamed = torch.tensor([-7, 3, 1000, 2**40])
    assert_as_oracle((bank[0], renamed[bank[1]]), (queries[0], renamed[queries[1]]), [5])
    same = knn(*bank, *queries, [5])
    assert knn(bank[0], renamed[bank[1]], queries[0], renamed[queries[1]], [5]) == same


def test_a_class_that_the_bank_lacks_is_never_first() -> None:
    bank = clusters(40, 4, 0)
    scores = knn(*bank, bank[0][:6], torch.full((6,), 9), [5])
    assert scores[5] == (0.0, 100.0, 6)  # fifth of five classes, by the rule for equal votes
    scores = knn(*bank, bank[0][:6], torch.full((6,), 9), [3])
    assert scores[3] == (0.0, 0.0, 6)


def test_one_class_is_always_right() -> None:
    features, _ = clusters(12, 1, 0)
    labels = torch.full((12,), 5)
    assert knn(features, labels, features[:1], labels[:1], [1, 200]) == {
        1: (100.0, 100.0, 1),
        12: (100.0, 100.0, 1),
    }


def test_top_five_counts_at_most_k_classes() -> None:
    bank = torch.eye(3, dtype=torch.float64)
    query = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    labels = torch.arange(3)
    for label, k, hit in [(1, 1, False), (1, 2, True), (2, 2, False), (2, 3, True)]:
        scores = knn(bank, labels, query, torch.tensor([label]), [k])
        assert scores[k].top5 == 100 * hit


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_lengths_of_features_do_not_matter(scale: float, seed: int) -> None:
    bank, queries = clusters(50, 5, seed), clusters(9, 5, seed + 1)
    lengths = torch.linspace(scale, 2 * scale, 50, dtype=torch.float64)[:, None]
    stretched = (bank[0] * lengths, bank[1])
    assert knn(*stretched, queries[0] * scale, queries[1]) == knn(*bank, *queries)


def test_a_tiny_temperature_is_the_nearest_neighbour() -> None:
    bank, queries = clusters(60, 5, 0), clusters(30, 5, 1)
    single = (bank[0].float(), bank[1]), (queries[0].float(), queries[1])
    sharp = knn(*single[0], *single[1], [20], 1e-4)  # exp(1 / 1e-4) would be infinite
    assert sharp[20].top1 == knn(*single[0], *single[1], [1])[1].top1


def test_inputs_stay_as_they_are() -> None:
    bank, queries = clusters(20, 3, 0), clusters(5, 3, 1)
    copies = [tensor.clone() for tensor in (*bank, *queries)]
    knn(*bank, *queries, [3])
    for tensor, copy in zip((*bank, *queries), copies, strict=True):
        assert torch.equal(tensor, copy)


BANK, LABELS = torch.randn(6, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": []}, "one or more"),
        ({"k": [0]}, "from 1 on"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": -1.0}, "must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"queries": BANK[:0], "query_labels": LABELS[:0]}, "no query"),
        ({"queries": BANK[:, :3]}, "must be"),
        ({"bank_labels": LABELS[:5]}, "one label for each"),
        ({"query_labels": LABELS[:5]}, "one label for each"),
        ({"bank": BANK * math.nan}, "diverged"),
        ({"queries": BANK / 0}, "diverged"),
        ({"bank": BANK[:0], "bank_labels": LABELS[:0]}, "at least one image"),
        ({"queries": BANK[:2], "query_labels": LABELS[:2], "leave_one_out": True}, "as queries"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_nonsense_is_refused(change: dict[str, object], sentence: str) -> None:
    settings = {"bank": BANK, "bank_labels": LABELS, "queries": BANK, "query_labels": LABELS}
    with pytest.raises(UserError, match=sentence):
        knn(**{**settings, **change})  # type: ignore[arg-type]


def test_one_image_has_no_other() -> None:
    with pytest.raises(UserError, match="besides"):
        knn(BANK[:1], LABELS[:1], BANK[:1], LABELS[:1], leave_one_out=True)
