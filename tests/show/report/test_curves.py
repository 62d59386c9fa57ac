"""Curves as SVG: well-formed, inside their frame, with honest points and round ticks."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.show.report.curves import (
    HEIGHT,
    WIDTH,
    Curve,
    Healthy,
    Level,
    apart,
    chart,
    nice_ticks,
    thinned,
)

FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


def points(svg: str) -> list[tuple[float, float]]:
    (line,) = ElementTree.fromstring(svg).findall("polyline")
    pairs = [pair.split(",") for pair in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=30), level=FINITE)
def test_everything_lies_inside_the_frame(values: list[float], level: float) -> None:
    curve = Curve("loss", range(1, len(values) + 1), values)
    svg = chart([curve], [Level("limit", level)])
    for x, y in points(svg):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    for line in ElementTree.fromstring(svg).findall("line"):
        assert 0 <= float(line.attrib["y1"]) <= HEIGHT


def test_higher_values_are_drawn_higher_and_later_steps_further_right() -> None:
    (x1, y1), (x2, y2), (x3, y3) = points(chart([Curve("k", [10, 20, 40], [1.0, 3.0, 2.0])]))
    assert y2 < y3 < y1
    assert x3 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)


def test_names_are_escaped() -> None:
    svg = chart([Curve('<b>"', [1], [1.0])], [Level("a < b &", 2.0)])
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"].startswith('<b>"')
    assert any("a < b &" in (text.text or "") for text in root.findall("text"))


@given(low=FINITE, length=st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low: float, length: float) -> None:
    high = low + length
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * max(abs(low), abs(high), length)
    if length > 1e-8 * abs(low):
        assert ticks[0] >= low - slack
        assert ticks[-1] <= high + slack


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 70, [0, 20, 40, 60]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.0005, [0, 0.0001, 0.0002, 0.0003, 0.0004, 0.0005]),
        (-3, 3, [-2, 0, 2]),
        (2, 2, [1, 1.5, 2, 2.5, 3]),
        (0, 0, [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_of_typical_ranges(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_few_points_stay_and_many_are_averaged() -> None:
    assert thinned([5.0, 6.0], 3) == [5.0, 6.0]
    steps = thinned(range(1000), 101)
    values = thinned([float(i % 2) for i in range(1000)], 101)
    assert len(steps) == len(values) == 101
    assert steps == sorted(steps)
    assert (steps[-1], values[-1]) == (999, 1.0)
    assert all(math.isclose(value, 0.5) for value in values[:-1])


@pytest.mark.parametrize(
    ("values", "healthy"),
    [([3.0, 4.0], Healthy(1.0, 2.0)), ([0.2, 0.1], Healthy(1.0)), ([5.0, 7.0], Healthy(1.0))],
)
def test_healthy_values_are_a_band_in_the_frame(values: list[float], healthy: Healthy) -> None:
    svg = chart([Curve("k", [1, 2], values)], [], healthy)
    (band,) = ElementTree.fromstring(svg).findall("rect")
    top, height = float(band.attrib["y"]), float(band.attrib["height"])
    assert 0 <= top < top + height <= HEIGHT
    for value, (_, y) in zip(values, points(svg), strict=True):
        inside = healthy.low <= value <= healthy.high
        assert (top - 0.1 <= y <= top + height + 0.1) == inside


@given(places=st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_letters_are_moved_apart_and_stay_in_the_frame(places: list[float]) -> None:
    moved = apart(places, 11, 0, 100)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in moved)
    for one, other in zip(sorted(moved), sorted(moved)[1:], strict=False):
        assert other - one >= 11 - 1e-6
    if all(abs(a - b) >= 11 for i, a in enumerate(places) for b in places[:i]):
        assert moved == places
