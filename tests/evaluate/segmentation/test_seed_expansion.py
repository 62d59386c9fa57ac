"""Seed expansion against the words of the paper, and by hand."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import discovery as oracle

from dino.evaluate.segmentation.seed_expansion import seed_expansion


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 30),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_objects_are_those_of_the_paper(seed: int, k: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    # Small integers: products have no rounding, and many patches have equal degrees.
    tokens = random.integers(-2, 3, (4, height, width)).astype(np.float64)
    tokens[0][(tokens == 0).all(axis=0)] = 1.0
    rows = tokens.reshape(4, -1).T.tolist()
    place, patches, sums = oracle.lost(rows, width, k)
    found = seed_expansion(torch.from_numpy(tokens), k)
    assert found.mask.ravel()[place]
    assert {*np.flatnonzero(found.mask)} == patches
    positive = np.array(sums).clip(0)
    assert np.allclose(found.saliency.ravel(), positive / positive.max())


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_scale_and_sign_do_not_matter(seed: int, scale: float) -> None:
    tokens = torch.from_numpy(np.random.default_rng(seed).standard_normal((6, 4, 5)))
    found = seed_expansion(tokens, 8)
    for changed in (scale * tokens, -tokens):
        other = seed_expansion(changed, 8)
        assert np.array_equal(found.mask, other.mask)
        assert np.allclose(found.saliency, other.saliency)


@given(seed=st.integers(0, 10**6))
def test_a_mirrored_image_has_the_mirrored_object(seed: int) -> None:
    tokens = torch.from_numpy(np.random.default_rng(seed).standard_normal((6, 4, 5)))
    rows = tokens.flatten(1).T
    degrees = ((rows @ rows.T) >= 0).sum(dim=1).sort().values
    assume(degrees[0] < degrees[1])  # else the first of equals is another patch
    k = 1
    found, mirrored = seed_expansion(tokens, k), seed_expansion(tokens.flip(2), k)
    assert np.array_equal(mirrored.mask[:, ::-1], found.mask)


def test_an_object_by_hand() -> None:
    # Three patches at the left agree, those at the right point away from them.
    tokens = torch.tensor([[[1.0, 2, -1, -1, -1, -1]], [[0.1, 0, 1, 1, 1, 1]]])
    found = seed_expansion(tokens, k=2)
    assert found.mask.tolist() == [[True, True, False, False, False, False]]
    sums = np.array([1.01 + 2.0, 2 + 4.0])  # of the products with both patches of the seed
    assert np.allclose(found.saliency[0, :2], sums / sums.max())
    assert (found.saliency[0, 2:] == 0).all()


def test_only_what_is_connected_with_the_seed_belongs_to_the_object() -> None:
    row = [1.0, -1, -1, -1, -1, -1, 1, 1]
    found = seed_expansion(torch.tensor([[row]]), k=1)
    assert found.mask.tolist() == [[True, *[False] * 7]]
    assert found.saliency.tolist() == [[1, 0, 0, 0, 0, 0, 1, 1]]
