"""CorLoc, IoU and the largest F against brute force and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import discovery as oracle

from dino.evaluate.segmentation.discovered import Discovered
from dino.evaluate.segmentation.discovery_metrics import (
    THRESHOLDS,
    agreement,
    box_iou,
    f_scores,
    summary,
)


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 255, 256, 10**6]))
def test_f_at_every_threshold_equals_brute_force(seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    saliency = random.integers(0, levels, 30) / (levels - 1)
    truth = random.random(30) < 0.4
    truth[0] = True
    expected = [oracle.f_at(saliency, truth, threshold) for threshold in THRESHOLDS]
    assert f_scores(saliency, truth) == pytest.approx(np.array(expected), abs=1e-12)
    assert len(THRESHOLDS) == 255


def test_a_perfect_map_has_f_1_at_every_threshold_and_an_empty_one_0() -> None:
    truth = np.array([True, False, False])
    assert (f_scores(truth * 1.0, truth) == 1).all()
    assert (f_scores(np.zeros(3), truth) == 0).all()
    everything = f_scores(np.ones(3), truth)
    assert everything == pytest.approx(np.full(255, 1.3 / (0.3 + 3)))


def test_the_largest_f_is_that_of_the_mean_over_images() -> None:
    truth = np.array([True, False])
    good_low = f_scores(np.array([0.3, 0.1]), truth)  # best between .1 and .3
    good_high = f_scores(np.array([0.9, 0.7]), truth)  # best between .7 and .9
    one, two = (np.array([x]) for x in (0.5, 0.25))
    found = summary([agreement_of(True, one, good_low), agreement_of(False, two, good_high)])
    assert found["corloc"] == 50
    assert found["iou"] == pytest.approx(37.5)
    best = max((good_low[i] + good_high[i]) / 2 for i in range(255))
    assert found["max_f"] == pytest.approx(100 * best)
    assert best < (good_low.max() + good_high.max()) / 2


def agreement_of(localized: bool, iou: np.ndarray, f: np.ndarray) -> object:
    from dino.evaluate.segmentation.discovery_metrics import Agreement

    return Agreement(localized, float(iou[0]), f)


BOXES = st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 6)] * 2)


@given(one=BOXES, other=BOXES)
def test_iou_of_boxes_equals_that_of_their_pixels(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> None:
    masks = np.zeros((2, 16, 16), dtype=bool)
    for mask, (left, top, width, height) in zip(masks, (one, other), strict=True):
        mask[top : top + height, left : left + width] = True
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert box_iou(one, other) == pytest.approx(expected)
    assert box_iou(other, one) == box_iou(one, other)


def test_agreement_by_hand() -> None:
    ids = np.array([[1, 1, 2, 0], [1, 1, 2, 255]], dtype=np.uint8)
    left = Discovered(np.array([[True, False]]), np.array([[1.0, 0.0]]))
    found = agreement(left, ids)
    assert found.localized  # by object 1, whose box is the left half
    assert found.iou == pytest.approx(4 / 6)  # both objects; void counts nowhere
    soft = np.array([1, 0.75, 0.25, 0, 1, 0.75, 0.25])
    truth = np.array([1, 1, 1, 0, 1, 1, 1], dtype=bool)
    assert found.f == pytest.approx(f_scores(soft, truth))
    right = agreement(Discovered(np.array([[False, True]]), np.array([[0.0, 1.0]])), ids)
    assert not right.localized  # 2 of 4 pixels of the box: exactly a half does not suffice
    assert right.iou == pytest.approx(2 / 7)
