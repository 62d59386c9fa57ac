"""The normalised cut: its eigenvector against a dense solver, the object on known images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import discovery as oracle
from torch import Tensor

from dino.evaluate.segmentation import normalized_cut as module
from dino.evaluate.segmentation.normalized_cut import normalized_cut, second_eigenvector

SEEDS = st.integers(0, 10**6)


def features(seed: int, height: int = 5, width: int = 6, noise: float = 0.3) -> Tensor:
    """Patches of a rectangle that point in one direction, the others in another, and noise."""
    generator = torch.Generator().manual_seed(seed)
    inside, outside = torch.randn(2, 8, 1, 1, generator=generator)
    outside = outside - (outside * inside).sum() / inside.square().sum() * inside  # orthogonal
    mask = torch.zeros(height, width)
    mask[1:3, 2:5] = 1
    clean = inside * mask + outside * (1 - mask)
    return clean + noise * torch.randn(8, height, width, generator=generator)


@pytest.mark.parametrize("seed", range(8))
def test_the_eigenvector_equals_that_of_a_dense_solver(seed: int) -> None:
    rows = features(seed, noise=1.0).flatten(1).T.numpy().astype(np.float64)
    weights = oracle.graph(rows, 0.2)
    values, vectors = oracle.cut_vector(weights)
    assert values[2] - values[1] > 1e-3  # else it is not unique
    found, expected = second_eigenvector(weights), vectors[:, 1]
    found = found / np.linalg.norm(found)
    expected = expected / np.linalg.norm(expected)
    assert min(np.abs(found - expected).max(), np.abs(found + expected).max()) < 1e-9


def test_where_lanczos_does_not_converge_a_dense_solver_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RESTARTS", 1)
    place = np.arange(300)
    chain = np.where(np.abs(place[:, None] - place) <= 1, 1.0, 1e-5)
    found, expected = second_eigenvector(chain), oracle.cut_vector(chain)[1][:, 1]
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)


def test_the_eigenvector_of_two_nodes() -> None:
    found = second_eigenvector(np.array([[1.0, 0.1], [0.1, 1.0]]))
    assert found[0] == pytest.approx(-found[1])


@given(seed=SEEDS)
def test_the_object_is_that_of_the_dense_solver(seed: int) -> None:
    tokens = features(seed, noise=0.8)
    width = tokens.shape[2]
    weights = oracle.graph(tokens.flatten(1).T.numpy().astype(np.float64), 0.2)
    found = normalized_cut(tokens)
    if weights.min() == 1:  # all patches are alike
        assert found.mask.all()
        return
    values, vectors = oracle.cut_vector(weights)
    if values[2] - values[1] < 1e-3:
        return
    vector = vectors[:, 1]
    order = np.argsort(-np.abs(vector))
    if np.abs(vector[order[0]]) - np.abs(vector[order[1]]) < 1e-9 * np.abs(vector[order[0]]):
        return  # which of two is the largest is a matter of rounding
    side = {
        p
        for p, value in enumerate(vector)
        if (value > vector.mean()) == (vector[order[0]] > vector.mean())
    }
    expected = oracle.connected(side, int(order[0]), width)
    assert {*np.flatnonzero(found.mask)} == expected
    assert found.saliency.min() == 0
    assert found.saliency.max() == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_rectangle_of_another_kind_is_the_object(seed: int) -> None:
    found = normalized_cut(features(seed, height=9, width=10, noise=0.05))
    expected = np.zeros((9, 10), dtype=bool)
    expected[1:3, 2:5] = True
    assert np.array_equal(found.mask, expected)
    assert found.saliency[expected].min() > found.saliency[~expected].max()


@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_length_of_the_features_does_not_matter(seed: int, scale: float) -> None:
    tokens = features(seed).double()
    lengths = torch.rand(tokens.shape[1:], dtype=torch.float64) + 0.5
    found, scaled = normalized_cut(tokens), normalized_cut(scale * lengths * tokens)
    assert np.array_equal(found.mask, scaled.mask)
    assert np.allclose(found.saliency, scaled.saliency, atol=1e-9)


def test_the_largest_value_and_not_the_sign_of_the_vector_says_what_the_object_is() -> None:
    tokens = features(0, 9, 10, noise=0.02)
    mirrored = normalized_cut(tokens.flip(1, 2))
    assert np.array_equal(mirrored.mask[::-1, ::-1], normalized_cut(tokens).mask)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1, 1), (1, 2, 2)])
def test_patches_that_are_all_alike_are_the_entire_image(shape: tuple[int, int, int]) -> None:
    found = normalized_cut(torch.ones(shape))
    assert found.mask.all()
    assert (found.saliency == 1).all()


def test_patches_of_which_none_is_alike_have_an_object() -> None:
    found = normalized_cut(torch.eye(6).unflatten(1, (2, 3)))
    assert found.mask.any()
    assert np.isfinite(found.saliency).all()
