"""Curves as inline SVG: no script, no fonts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26
LETTERS = 22
"""The margin on the right where letters stand at the ends of curves."""
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


class Healthy(NamedTuple):
    """The values of a measure in healthy runs, from `low` to `high`; drawn as a shaded band."""

    low: float
    high: float = math.inf


def chart(
    curves: Sequence[Curve | None], levels: Sequence[Level] = (), healthy: Healthy | None = None
) -> str:
    """Curves of one measure as an SVG element; its vertical axis includes 0.

    Args:
        curves: one or more, each with at least one point; None for a run without this measure. Of
            several, the end of each has the letter (A, B, ...) of its place, its colour and its
            pattern of dashes: `swatch` shows them.
        levels: dashed lines.
        healthy: the shaded band.
    """
    shown = {place: curve for place, curve in enumerate(curves) if curve is not None}
    thin = [(thinned(one.steps, POINTS), thinned(one.values, POINTS)) for one in shown.values()]
    reach = [value for _, values in thin for value in values]
    reach += [level.value for level in levels] + (
        [min(1.2 * healthy.low, healthy.high)] if healthy else []
    )
    ticks = nice_ticks(min(0.0, *reach), max(reach))
    low, high = min(ticks[0], *reach), max(ticks[-1], *reach)
    last = max(steps[-1] for steps, _ in thin)
    right = WIDTH - (RIGHT if len(curves) == 1 else LETTERS)

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * step / max(last, 1e-9)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    label = "; ".join(
        f"{curve.name}: {values[0]:.4g} at first, {values[-1]:.4g} at step {steps[-1]:g}"
        for curve, (steps, values) in zip(shown.values(), thin, strict=True)
    )
    elements = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    if healthy is not None:
        top, bottom = y(min(healthy.high, high)), y(healthy.low)
        area = f'x="{LEFT}" y="{top:.1f}" width="{right - LEFT}" height="{bottom - top:.1f}"'
        elements.append(f'<rect class="healthy-band" {area}/>')
    for tick in ticks:
        elements += [
            _line("grid", y(tick), right),
            _text(LEFT - 6, y(tick) + 3.5, "end", f"{tick:g}"),
        ]
    for step, anchor in {last: "end", last / 2: "middle", 0: "start"}.items():
        text = f"step {step:,.0f}" if step == last else f"{step:,.0f}"
        elements.append(_text(x(step), HEIGHT - 8, anchor, text))
    first_y, last_y = y(thin[0][1][0]), y(thin[0][1][-1])
    for level in levels:  # named at the end and on the side that are farther from the curve
        height = y(level.value)
        left = abs(first_y - height) > abs(last_y - height)
        below = (first_y if left else last_y) < height or height < TOP + 10
        place, anchor = (LEFT + 4, "start") if left else (right - 2, "end")
        name = f"{level.name} {level.value:.4g}"
        elements.append(_line("level", height, right))
        elements.append(_text(place, height + (13 if below else -5), anchor, name, "name"))
    heights = apart([y(values[-1]) for _, values in thin], 11, TOP, HEIGHT - BOTTOM)
    for number, (steps, values), height in zip(shown, thin, heights, strict=True):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))
        css = f"curve run{number}" if len(curves) > 1 else "curve"
        elements.append(f'<polyline class="{css}" points="{points}"/>')
        end = f'cx="{x(steps[-1]):.1f}" cy="{y(values[-1]):.1f}"'
        elements.append(f'<circle class="end {css.partition(" ")[2]}" {end} r="3"/>')
        if len(curves) > 1:
            elements.append(
                _text(x(steps[-1]) + 6, height + 4, "start", letter(number), f"letter run{number}")
            )
    return "".join([*elements, "</svg>"])


def letter(number: int) -> str:
    """What a run is called beside its curves and pictures: A, B, ..."""
    return chr(ord("A") + number)


def swatch(number: int) -> str:
    """A piece of the line that stands for a run in charts of several, with its letter."""
    line = f'<line class="curve run{number}" x1="0" x2="34" y1="5" y2="5"/>'
    svg = f'<svg viewBox="0 0 34 10" aria-hidden="true">{line}</svg>'
    return f'<span class="swatch">{svg}{letter(number)}</span>'


def run_head(count: int, first: str) -> str:
    """The head of a table with a column for each run."""
    cells = "".join(f'<th scope="col">{swatch(number)}</th>' for number in range(count))
    return f'<tr><th scope="col">{escape(first)}</th>{cells}</tr>'


def run_lines(rows: Mapping[str, Sequence[str]]) -> str:
    """The lines of such a table, by their names."""
    found = []
    for name, cells in rows.items():
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        found.append(f'<tr><th scope="row">{escape(name)}</th>{columns}</tr>')
    return "".join(found)


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved as little as is simple, so that any two are `gap` apart if they can be."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + gap)
    over = max(0.0, max(moved) - high)
    moved = [place - over for place in moved]
    for number, index in enumerate(order):  # what the shift has pushed beyond the low end
        moved[index] = max(moved[index], low + number * gap)
    return moved


def _line(css: str, height: float, right: float) -> str:
    y = f"{height:.1f}"
    return f'<line class="{css}" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'


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
