"""Masks of patches as pixels, boxes and saliency."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle.segmentation import enlarged

from dino.evaluate.segmentation.discovered import Discovered, box_of, connected_to, stretched


@given(seed=st.integers(0, 10**6), height=st.integers(4, 20), width=st.integers(4, 20))
def test_pixels_are_those_of_the_oracle_and_boxes_hold_them(
    seed: int, height: int, width: int
) -> None:
    mask = np.random.default_rng(seed).random((3, 4)) < 0.3
    mask[1, 2] = True
    mask = connected_to(6, mask)
    found = Discovered(mask, mask.astype(float))
    pixels = found.pixels(height, width)
    assert np.array_equal(pixels, enlarged(mask, height, width))
    left, top, across, down = found.box(height, width)
    assert pixels[top : top + down, left : left + across].sum() == pixels.sum()
    for edge in (
        pixels[top, left : left + across],
        pixels[top + down - 1, left : left + across],
        pixels[top : top + down, left],
        pixels[top : top + down, left + across - 1],
    ):
        assert edge.any()


def test_the_box_is_that_of_the_largest_connected_part() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]], dtype=bool)
    assert Discovered(mask, mask * 1.0).box(6, 8) == (4, 2, 4, 4)  # corners do not connect


def test_box_and_connection_by_hand() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 0, 0, 1]], dtype=bool)
    assert box_of(mask) == (0, 0, 4, 2)
    assert connected_to(3, mask).tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert connected_to(4, mask).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_saliency_is_enlarged_bilinearly_and_stretched() -> None:
    found = Discovered(np.array([[True, False]]), np.array([[1.0, 0.0]]))
    assert found.soft(1, 4).tolist() == [[1, 0.75, 0.25, 0]]
    assert found.contrast == 1
    assert Discovered(np.ones((1, 2), dtype=bool), np.array([[1.0, 0.0]])).contrast == 0.5
    assert stretched(np.array([[2.0, 4.0, 3.0]])).tolist() == [[0, 1, 0.5]]
    assert stretched(np.full((1, 2), 7.0)).tolist() == [[1, 1]]
    assert found.soft(1, 1).item() == pytest.approx(0.5)
