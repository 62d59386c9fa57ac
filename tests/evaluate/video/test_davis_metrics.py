"""J and F against their oracle, and cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import overlap as oracle

from dino.evaluate.video.davis_metrics import boundary, boundary_score, dilated, jaccard, statistics


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """A few rectangles, some at the rim, some empty, with a little salt."""
    random = np.random.default_rng(seed)
    mask = random.random((height, width)) < random.choice([0, 0.02])
    for _ in range(random.integers(0, 3)):
        y, x = random.integers(0, height), random.integers(0, width)
        mask[y : y + random.integers(1, 9), x : x + random.integers(1, 9)] = True
    return mask


@given(seed=st.integers(0, 10**6), height=st.integers(1, 24), width=st.integers(1, 24))
def test_both_scores_equal_the_oracle(seed: int, height: int, width: int) -> None:
    found, truth = blobs(seed, height, width), blobs(seed + 1, height, width)
    assert jaccard(found, truth) == pytest.approx(oracle.jaccard(found, truth), abs=1e-12)
    assert {*zip(*np.nonzero(boundary(found)), strict=True)} == oracle.boundary(found)
    expected = oracle.boundary_score(found, truth)
    assert boundary_score(found, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_large_images_equal_the_oracle(seed: int) -> None:
    found, truth = blobs(seed, 90, 210), blobs(seed + 1, 90, 210)  # tolerance of two pixels
    expected = oracle.boundary_score(found, truth)
    assert boundary_score(found, truth) == pytest.approx(expected, abs=1e-12)


def square(top: int, left: int, side: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


NOTHING = square(0, 0, 0)


def test_empty_masks() -> None:
    thing = square(5, 5, 4)
    assert (jaccard(NOTHING, NOTHING), boundary_score(NOTHING, NOTHING)) == (1, 1)
    assert (jaccard(thing, NOTHING), boundary_score(thing, NOTHING)) == (0, 0)  # it has vanished
    assert (jaccard(NOTHING, thing), boundary_score(NOTHING, thing)) == (0, 0)  # it was lost


def test_a_full_mask_has_no_boundary() -> None:
    everything = square(0, 0, 20)
    assert not boundary(everything).any()
    assert jaccard(everything, NOTHING) == 0
    assert boundary_score(everything, NOTHING) == 1


def test_one_pixel() -> None:
    pixel = square(7, 9, 1)
    # Itself, and those whose right, lower or lower right neighbour it is.
    assert {*zip(*np.nonzero(boundary(pixel)), strict=True)} == {(7, 9), (7, 8), (6, 9), (6, 8)}
    assert (jaccard(pixel, pixel), boundary_score(pixel, pixel)) == (1, 1)
    # 20 x 20 pixels: the tolerance is ceil(0.23) = 1, so two of four pixels meet their neighbour.
    moved = square(7, 11, 1)
    assert jaccard(pixel, moved) == 0
    assert boundary_score(pixel, moved) == pytest.approx(0.5)
    corner = square(19, 19, 1)  # of the lower right corner only its neighbours are boundary
    assert {*zip(*np.nonzero(boundary(corner)), strict=True)} == {(19, 18), (18, 19), (18, 18)}


def test_shifted_squares_by_hand() -> None:
    assert jaccard(square(4, 4, 4), square(4, 6, 4)) == pytest.approx(8 / 24)


def test_the_disk_of_the_tolerance() -> None:
    one = square(10, 10, 1)
    for radius in range(5):
        y, x = np.mgrid[:20, :20] - 10
        assert np.array_equal(dilated(one, radius), y**2 + x**2 <= radius**2)


def test_statistics_by_hand() -> None:
    scores = [1.0, 0.9, 0.8, 0.5, 0.6, 0.4, 0.2, 0.1, 0.0]  # quarters end at frames 1 3 5 7 9
    found = statistics(scores)
    assert found["mean"] == pytest.approx(50)
    assert found["recall"] == pytest.approx(400 / 9)  # 0.5 itself is not above
    assert found["decay"] == pytest.approx(100 * (1 + 0.9 + 0.8) / 3 - 100 * (0.2 + 0.1) / 3)
    assert statistics([0.7]) == {"mean": 70.0, "recall": 100.0, "decay": 0.0}


def test_long_videos_have_a_last_quarter() -> None:
    scores = [1.0] * 300 + [0.0] * 300
    assert statistics(scores)["decay"] == pytest.approx(100)
