from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from dino.data.views.random_streams import ViewParams, crop_box, draw_views, epoch_order, generator
from dino.data.views.view_spec import (
    NEVER_SOLARIZE,
    PHOTOMETRIC,
    ViewSettings,
    ViewSpec,
    expand,
    view_groups,
)
from dino.files import UserError

PLAIN = ViewSpec(name="plain", count=1, size=32, scale=(0.3, 0.9))


def drawn(spec: ViewSpec, height: int = 120, width: int = 160, images: int = 3000) -> list:
    return [draw_views([spec], height, width, generator(0, 0, i))[0] for i in range(images)]


# ---------------------------------------------------------------------------------- the paper's
def test_the_views_of_the_paper() -> None:
    first, second, local = ViewSettings().specs()
    assert (first.size, first.scale, first.blur, first.solarize) == (224, (0.25, 1.0), 1.0, 0.0)
    assert (second.size, second.scale, second.blur, second.solarize) == (224, (0.25, 1), 0.1, 0.2)
    assert (local.size, local.scale, local.blur, local.solarize) == (96, (0.05, 0.25), 0.5, 0.0)
    assert [spec.count for spec in (first, second, local)] == [1, 1, 10]
    for spec in (first, second, local):
        assert (spec.flip, spec.jitter, spec.grey) == (0.5, 0.8, 0.2)
        assert (spec.brightness, spec.contrast, spec.saturation, spec.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (spec.blur_sigma, spec.solarize_threshold) == ((0.1, 2.0), 128)
        assert spec.ratio == (3 / 4, 4 / 3)


def test_no_local_views_leave_the_two_globals() -> None:
    assert [spec.name for spec in ViewSettings(local_count=0).specs()] == ["global1", "global2"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", -1),
        ("size", 0),
        ("scale", (0.0, 0.5)),
        ("scale", (0.6, 0.5)),
        ("scale", (0.5, 1.1)),
        ("ratio", (2.0, 1.0)),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("brightness", -0.1),
        ("saturation", math.inf),
        ("hue", 0.6),
        ("blur_sigma", (2.0, 0.1)),
        ("blur", math.nan),
        ("solarize_threshold", 256.0),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"plain\.{field} is"):
        replace(PLAIN, **{field: value})


def test_groups_are_the_globals_and_runs_of_equal_size() -> None:
    assert view_groups(ViewSettings(local_count=3).specs()) == [range(2), range(2, 5)]
    assert view_groups(ViewSettings(local_count=0).specs()) == [range(2)]
    same_size = ViewSettings(global_size=64, local_size=64, local_count=2).specs()
    assert view_groups(same_size) == [range(2), range(2, 4)]
    more = (*ViewSettings(local_count=2).specs(), replace(PLAIN, count=2), replace(PLAIN, size=96))
    assert view_groups(more) == [range(2), range(2, 4), range(4, 6), range(6, 7)]


def test_groups_need_two_globals_of_one_size() -> None:
    with pytest.raises(UserError, match="needs 2 global views, not 1"):
        view_groups([PLAIN])
    with pytest.raises(UserError, match="share one size"):
        view_groups([PLAIN, replace(PLAIN, size=48)])


# ---------------------------------------------------------------------------------- randomness
def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    specs = ViewSettings().specs()

    def views(seed: int, epoch: int, index: int) -> list[ViewParams]:
        return draw_views(specs, 90, 120, generator(seed, epoch, index))

    assert views(1, 2, 3) == views(1, 2, 3)
    others = [views(0, 2, 3), views(1, 3, 3), views(1, 2, 4), views(1, 3, 2), views(2, 1, 3)]
    boxes = {tuple(view.box for view in drawn) for drawn in [views(1, 2, 3), *others]}
    assert len(boxes) == 6


def test_later_views_and_other_probabilities_do_not_disturb_a_view() -> None:
    few = draw_views(ViewSettings(local_count=1).specs(), 90, 120, generator(0, 0, 0))
    many = draw_views(ViewSettings(local_count=9).specs(), 90, 120, generator(0, 0, 0))
    assert many[:3] == few
    quiet = replace(PLAIN, blur=0.0, jitter=0.0)
    loud = replace(PLAIN, blur=1.0, jitter=1.0)
    for index in range(20):
        [one] = draw_views([quiet], 90, 120, generator(0, 0, index))
        [two] = draw_views([loud], 90, 120, generator(0, 0, index))
        assert replace(two, jitter=False, sigma=0.0) == one


def test_streams_do_not_meet() -> None:
    """Neighbouring images, and the views and the order of one epoch, share no number."""
    one, two = (generator(0, 0, index).random(1000) for index in (0, 1))
    assert not np.isin(one, two).any()
    assert epoch_order(100, 0, 0).tolist() != generator(0, 0, 0).permutation(100).tolist()


def test_negative_and_huge_seeds_are_seeds() -> None:
    draws = {generator(seed, 0, 0).random() for seed in (-1, 0, 1, 2**63)}
    assert len(draws) == 4


def test_draws_keep_their_values() -> None:
    """Published runs must stay repeatable: a change of these numbers is a change of every run."""
    [view] = draw_views([PLAIN], 120, 160, generator(7, 2, 5))
    assert view.box == (5, 52, 96, 92)
    assert view.order == (1, 0, 2, 3)
    assert view.row()[1:5] == pytest.approx((1.122847, 1.200881, 1.105588, 0.089376), abs=1e-6)
    assert epoch_order(8, 7, 2).tolist() == [1, 4, 7, 5, 2, 3, 0, 6]


def test_an_epoch_visits_everything_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(50, 0, epoch).tolist() for epoch in range(3)] + [
        epoch_order(50, 1, 0).tolist()
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


# ---------------------------------------------------------------------------------- the law
@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    low=st.floats(0.01, 1),
    index=st.integers(0, 2**40),
)
def test_a_box_lies_inside_its_image(height: int, width: int, low: float, index: int) -> None:
    spec = replace(PLAIN, scale=(low, 1.0))
    [view] = draw_views([spec], height, width, generator(0, 0, index))
    top, left, box_height, box_width = view.box
    assert min(top, left) >= 0
    assert min(box_height, box_width) >= 1
    assert top + box_height <= height
    assert left + box_width <= width


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (375, 500, (0.25, 1.0)),
        (375, 500, (0.05, 0.25)),
        (96, 96, (0.14, 1.0)),
        (300, 800, (0.25, 1.0)),  # many boxes do not fit
        (40, 900, (0.5, 1.0)),  # none does: the centred fallback
    ],
)
def test_boxes_follow_the_law_of_torchvision(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    """Two-sample Kolmogorov-Smirnov, 3000 boxes each, on every property of a box; p > 0.001."""
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(3000)]
    )
    ours = np.array([view.box for view in drawn(replace(PLAIN, scale=scale), height, width)])
    properties = {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "vertical centre": lambda box: 2 * box[:, 0] + box[:, 2],
        "horizontal centre": lambda box: 2 * box[:, 1] + box[:, 3],
    }
    for name, take in properties.items():
        assert ks_2samp(take(ours), take(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(30, 3000), (3000, 30)])
def test_the_fallback_box_is_torchvisions(height: int, width: int) -> None:
    spec = replace(PLAIN, scale=(0.9, 1.0))
    [view] = draw_views([spec], height, width, generator(0, 0, 0))
    image = torch.empty(3, height, width)
    assert view.box == tuple(RandomResizedCrop.get_params(image, spec.scale, spec.ratio))


def test_a_box_reaches_every_border() -> None:
    tries = [0.5] * 20
    for place, (row, column) in {(0, 0): (0.0, 0.0), (50, 80): (0.9999, 0.9999)}.items():
        spec = replace(PLAIN, scale=(0.25, 0.25), ratio=(1.6, 1.6))
        assert crop_box(spec, 100, 160, [*tries, row, column]) == (*place, 50, 80)


def test_switches_come_as_often_as_they_should() -> None:
    spec = replace(
        PLAIN, flip=0.5, jitter=0.8, grey=0.2, blur=0.3, solarize=0.1, solarize_threshold=100.0
    )
    views = drawn(spec)
    for probability, on in (
        (0.5, [view.flip for view in views]),
        (0.8, [view.jitter for view in views]),
        (0.2, [view.grey for view in views]),
        (0.3, [view.sigma > 0 for view in views]),
        (0.1, [view.solarize == 100 for view in views]),
    ):
        sigma = math.sqrt(probability * (1 - probability) / len(views))
        assert abs(np.mean(on) - probability) < 4 * sigma
    assert {view.solarize for view in views} == {100, NEVER_SOLARIZE}


def test_strengths_are_uniform_in_their_ranges() -> None:
    views = drawn(replace(PLAIN, blur=1.0, brightness=1.5))
    for name, low, high in (
        ("brightness", 0.0, 2.5),  # cut at 0, as in torchvision
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        values = [getattr(view, name) for view in views]
        assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3, name


def test_all_24_orders_are_equally_likely() -> None:
    orders = [view.order for view in drawn(PLAIN)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3


# ---------------------------------------------------------------------------------- as numbers
def test_a_row_holds_every_photometric_number_under_its_name() -> None:
    [view] = draw_views([replace(PLAIN, blur=1.0)], 90, 120, generator(0, 0, 0))
    row = dict(zip(PHOTOMETRIC, view.row(), strict=True))
    for name in {field.name for field in fields(ViewParams)} & set(PHOTOMETRIC):
        assert row[name] == getattr(view, name)
    assert tuple(row[name] for name in ("first", "second", "third", "fourth")) == view.order


def test_views_come_in_the_order_of_their_specs() -> None:
    specs = ViewSettings(local_count=4).specs()
    assert [spec.name for spec in expand(specs)] == ["global1", "global2", *["local"] * 4]
    views = draw_views(specs, 100, 100, generator(0, 0, 0))
    shares = [view.box[2] * view.box[3] / 100**2 for view in views]
    assert min(shares[:2]) > 0.24
    assert max(shares[2:]) < 0.26
