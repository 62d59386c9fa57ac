"""Curves as inline SVG: no script, no fonts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26
POINTS = 300
"""More points than this are averaged: a page cannot show more."""


class Curve(NamedTuple):
    """A measure over the steps of a run: its name, ascending steps and a finite value for each."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


class Level(NamedTuple):
    """A value to compare a curve with, drawn as a dashed line."""

    name: str
    value: float


def chart(curve: Curve, levels: Sequence[Level] = ()) -> str:
    """One curve (at least one point) and levels as an SVG element; its vertical axis includes 0."""
    steps, values = thinned(curve.steps, POINTS), thinned(curve.values, POINTS)
    reach = [*values, *(level.value for level in levels)]
    ticks = nice_ticks(min(0.0, *reach), max(reach))
    low, high = min(ticks[0], *reach), max(ticks[-1], *reach)
    last = steps[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1e-9)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))
    label = f"{curve.name}: {values[0]:.4g} at first, {values[-1]:.4g} at step {last:g}"
    elements = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        elements += [_line("grid", y(tick)), _text(LEFT - 6, y(tick) + 3.5, "end", f"{tick:g}")]
    for step, anchor in {last: "end", last / 2: "middle", 0: "start"}.items():
        text = f"step {step:,.0f}" if step == last else f"{step:,.0f}"
        elements.append(_text(x(step), HEIGHT - 8, anchor, text))
    first_y, last_y = y(values[0]), y(values[-1])
    for level in levels:  # named at the end and on the side that are farther from the curve
        height = y(level.value)
        left = abs(first_y - height) > abs(last_y - height)
        below = (first_y if left else last_y) < height or height < TOP + 10
        place, anchor = (LEFT + 4, "start") if left else (WIDTH - RIGHT - 2, "end")
        name = f"{level.name} {level.value:.4g}"
        elements.append(_line("level", height))
        elements.append(_text(place, height + (13 if below else -5), anchor, name, "name"))
    elements.append(f'<polyline class="curve" points="{points}"/>')
    elements.append(f'<circle class="end" cx="{x(last):.1f}" cy="{last_y:.1f}" r="3"/></svg>')
    return "".join(elements)


def _line(css: str, height: float) -> str:
    y = f"{height:.1f}"
    return f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def _text(x: float, y: float, anchor: str, text: str, css: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{css}" {place}>{escape(text)}</text>'


def thinned(numbers: Sequence[float], most: int) -> list[float]:
    """At most `most` numbers: means of equally many neighbours; the last stays as it is."""
    if len(numbers) <= most:
        return list(numbers)
    groups = np.array_split(np.asarray(numbers), most - 1)
    return [*(float(group.mean()) for group in groups), numbers[-1]]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]
