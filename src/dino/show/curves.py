"""Curves as inline SVG: no script, no fonts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26
POINTS = 300
"""More points than this are averaged: a page cannot show more."""


@dataclass(frozen=True)
class Curve:
    """A measure over the steps of a run.

    Attributes:
        name: of the measure.
        steps: ascending.
        values: one a step, finite.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Level:
    """A value to compare a curve with, drawn as a dashed line."""

    name: str
    value: float


def chart(curve: Curve, levels: Sequence[Level] = ()) -> str:
    """One curve with its levels as an SVG element; the vertical axis begins at 0 or below.

    Args:
        curve: at least one point.
        levels: values to draw as lines.
    """
    steps, values = thinned(curve.steps, curve.values, POINTS)
    reach = [*values, *(level.value for level in levels)]
    ticks = nice_ticks(min(0.0, *reach), max(reach))
    low, high = min(ticks[0], *reach), max(ticks[-1], *reach)
    last = curve.steps[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1e-9)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))
    described = f"{curve.name}: {values[0]:.4g} at first, {curve.values[-1]:.4g} at step {last:g}"
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}">',
            *(_tick(tick, y(tick)) for tick in ticks),
            *(_step(step, x(step)) for step in (0, last / 2, last)),
            *(_level(level, y(level.value), curve, y) for level in levels),
            f'<polyline class="curve" points="{points}"/>',
            f'<circle class="end" cx="{x(last):.1f}" cy="{y(curve.values[-1]):.1f}" r="3"/></svg>',
        ]
    )


def _across(css: str, height: float) -> str:
    y = f"{height:.1f}"
    return f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def _tick(value: float, height: float) -> str:
    place = f'x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end"'
    return f"{_across('grid', height)}<text {place}>{value:g}</text>"


def _step(step: float, place: float) -> str:
    anchor = "middle" if step else "start"
    anchor = "end" if place > WIDTH - RIGHT - 1 else anchor
    text = f"step {step:,.0f}" if anchor == "end" else f"{step:,.0f}"
    return f'<text x="{place:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text}</text>'


def _level(level: Level, height: float, curve: Curve, y: Callable[[float], float]) -> str:
    """A dashed line, named at the end and on the side that are free of the curve."""
    first, last = y(curve.values[0]), y(curve.values[-1])
    left = abs(first - height) > abs(last - height)
    place, anchor = (LEFT + 4, "start") if left else (WIDTH - RIGHT - 2, "end")
    under = (first if left else last) < height or height < TOP + 10
    name_height = height + (13 if under else -5)
    return (
        f'{_across("level", height)}<text class="name" x="{place}" y="{name_height:.1f}" '
        f'text-anchor="{anchor}">{escape(level.name)} {level.value:.4g}</text>'
    )


def thinned(
    steps: Sequence[float], values: Sequence[float], most: int
) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equally many neighbours; the last point stays as it is."""
    if len(steps) <= most:
        return list(steps), list(values)
    edges = [len(steps) * i // (most - 1) for i in range(most)]
    parts = [slice(low, high) for low, high in pairwise(edges)]
    means = [
        [sum(numbers[part]) / len(numbers[part]) for part in parts] for numbers in (steps, values)
    ]
    return [*means[0], steps[-1]], [*means[1], values[-1]]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]
