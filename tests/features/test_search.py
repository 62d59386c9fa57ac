"""The exact search: against a full sort, whatever the tiles, and through ties."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino.features import search as neighbours
from dino.features.search import nearest


def axes(count: int, seed: int) -> Tensor:
    """Signed unit vectors: every similarity is exactly -1, 0 or 1, so nearly all are tied."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.zeros(count, 3, dtype=torch.float64)
    place = torch.randint(3, (count,), generator=generator)
    sign = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    vectors[torch.arange(count), place] = sign.double()
    return vectors


def sorted_fully(queries: Tensor, bank: Tensor, k: int, skip: int | None) -> tuple[Tensor, Tensor]:
    scores = queries @ bank.T
    if skip is not None:
        rows = torch.arange(len(queries))
        scores[rows, rows + skip] = -torch.inf
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@settings(deadline=None)
@given(
    n=st.integers(2, 40),
    q=st.integers(1, 12),
    chunk=st.integers(1, 13),
    tile=st.integers(1, 41),
    group=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_ties_go_to_the_first_whatever_the_tiles(
    n: int, q: int, chunk: int, tile: int, group: int, seed: int, data: st.DataObject
) -> None:
    bank, queries = axes(n, seed), axes(q, seed + 1)
    k = data.draw(st.integers(1, n))
    with patch.object(neighbours, "GROUP", group):
        values, index = nearest(queries, bank, k, chunk=chunk, tile=tile)
    expected = sorted_fully(queries, bank, k, None)
    assert torch.equal(values, expected[0])
    assert torch.equal(index, expected[1])


@settings(deadline=None)
@given(
    n=st.integers(2, 30),
    chunk=st.integers(1, 31),
    tile=st.integers(1, 31),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_no_image_is_its_own_neighbour(
    n: int, chunk: int, tile: int, seed: int, data: st.DataObject
) -> None:
    bank = axes(n, seed)
    first = data.draw(st.integers(0, n - 1))
    queries = bank[first:]
    k = data.draw(st.integers(1, n - 1))
    values, index = nearest(queries, bank, k, skip=first, chunk=chunk, tile=tile)
    expected = sorted_fully(queries, bank, k, first)
    assert torch.equal(values, expected[0])
    assert torch.equal(index, expected[1])
    assert (index != torch.arange(first, n)[:, None]).all()


@settings(deadline=None)
@given(
    n=st.integers(8, 90),
    k=st.integers(1, 12),
    group=st.integers(1, 6),
    levels=st.sampled_from([2, 10, 1000]),
    skipped=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_groups_of_columns_do_not_change_the_result(
    n: int, k: int, group: int, levels: int, skipped: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (7, n), generator=generator).float()
    if skipped:
        scores.diagonal(1).fill_(-torch.inf)
    k = min(k, n - skipped)
    with patch.object(neighbours, "GROUP", group):
        values, index = neighbours._top(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(index, expected.indices[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_features_agree_with_a_full_sort(dtype: torch.dtype) -> None:
    bank, queries = torch.randn(3000, 8, dtype=dtype), torch.randn(41, 8, dtype=dtype)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (queries, bank)]
    values, index = nearest(queries, bank, 20, chunk=16, tile=1500)
    expected = sorted_fully(*unit, 20, None)
    assert values.dtype == dtype
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(index, expected[1])


def test_a_constant_network_keeps_the_order_of_the_bank() -> None:
    bank = torch.ones(200, 4)
    _, index = nearest(bank[:3], bank, 150, chunk=2, tile=60)
    assert torch.equal(index, torch.arange(150).expand(3, 150))


def test_half_precision_is_searched_in_single() -> None:
    bank = torch.randn(50, 16).bfloat16()
    values, _ = nearest(bank[:4], bank, 5)
    assert values.dtype == torch.float32
    assert (values[:, 0] - 1).abs().max() < 1e-6


def test_a_zero_feature_has_similarity_zero() -> None:
    bank = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    values, index = nearest(torch.tensor([[2.0, 0.0]]), bank, 3)
    assert index.tolist() == [[2, 0, 1]]
    assert values.tolist() == [[1.0, 0.0, -1.0]]
