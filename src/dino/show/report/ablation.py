"""The page of an ablation: our accuracies beside the paper's, and its drawing as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from dino.show.html import figure, page, table
from dino.show.report.curves import nice_ticks, thinned

SIZE, LEFT, RIGHT, TOP, BOTTOM = (640, 420), 46, 190, 16, 36
PANEL = (620, 230)
COLOURS = ("#1f63c6", "#c2410c", "#6d28d9", "#0f766e", "#9a6700")
STYLE = (
    "<style>text{font:11.5px system-ui,sans-serif;fill:#5d636e}.grid{stroke:#d9d7d0}"
    ".error{stroke:#1f63c6;stroke-width:1.5}.cross{stroke:#a4550b;stroke-width:2}</style>"
)
"""Inside the drawing, which is also a file of its own; readable on light and dark ground."""


class Point(NamedTuple):
    """A row: the paper's value, ours with its standard deviation, and whether it collapsed."""

    name: str
    paper: float
    ours: float
    deviation: float | None
    collapsed: bool


def ablation_page(
    content: Mapping[str, Any], lines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[str, str]:
    """The drawing (SVG) and the page (HTML) of a table.

    Args:
        content: of `results.json` (`dino.ablation`).
        lines: metrics of each row's first seed, for figures that show curves.
    """
    if content["table"] == "figure7":
        drawing = curves(lines, {"teacher_entropy": "entropy", "kl": "KL divergence"})
        caption = (
            "Entropy of the teacher's targets and KL divergence between teacher and student, in "
            "nats, over the steps of seed 0. A KL divergence of 0 is a collapse; the entropy is "
            "then 0 without centering, and ln K without sharpening (section 5.3)."
        )
    else:
        points = [
            Point(row["name"], row["paper"], row["knn"], row["deviation"], bool(row["collapse"]))
            for row in content["rows"]
            if row["paper"] is not None
        ]
        drawing = scatter(points)
        caption = (
            "Upwards: our k-NN accuracy, with the standard deviation over seeds. To the right: the "
            f"paper's accuracy ({columns(content)[2]}). Percent. A cross is a collapse."
        )
    title, correlation = content["title"], content["rank_correlation"]
    agrees = "" if correlation is None else f" Rank correlation (Spearman): {correlation:.2f}."
    cells = [
        (row["name"], *row_cells(row), ", ".join(f"{k} {v}" for k, v in row["settings"].items()))
        for row in content["rows"]
    ]
    words = (
        f"{content['seeds']} seeds a row, {content['images']:,} images a run, {content['network']}."
        f" {content['note']}{agrees}"
    )
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(words)}</p>",
        f'<div class="card">{figure(drawing, caption)}</div>',
        f'<h2>Rows</h2><div class="card">{table(cells, [*columns(content), "settings"])}</div>',
        f'<p class="soft">{escape(content["command"])}<br>{escape(content["device"])}</p>',
    ]
    return drawing, page(title, sections)


def columns(content: Mapping[str, Any]) -> list[str]:
    """The head of the table."""
    paper = {"knn": "paper, k-NN", "linear": "paper, linear"}[content["paper_measure"]]
    return ["row", "ours, k-NN", paper, "collapsed", "in the paper"]


def row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands behind the name of a row."""
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.1f}"
    count = f"{row['collapsed_seeds']} of {len(row['seeds'])}: {row['collapse']}"
    return (
        f"{row['knn']:.1f}{spread}",
        "-" if row["paper"] is None else f"{row['paper']:.1f}",
        count if row["collapse"] else "-",
        "collapsed" if row["collapses_in_paper"] else "-",
    )


class _Axes:
    """The frame of a drawing: its scales, grid and numbers."""

    def __init__(self, size: tuple[int, int], x: Sequence[float], y: Sequence[float]) -> None:
        self.width, self.height = size
        self.x_ticks, self.y_ticks = nice_ticks(min(x), max(x)), nice_ticks(min(y), max(y))
        self.x_range = min(*x, *self.x_ticks), max(*x, *self.x_ticks)
        self.y_range = min(*y, *self.y_ticks), max(*y, *self.y_ticks)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (self.width - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)

    def frame(self, below: str, beside: str) -> list[str]:
        """Grid, numbers, and the names of both axes."""
        found = []
        for tick in self.y_ticks:
            y = self.y(tick)
            end = self.width - RIGHT
            found.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            found.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
        for tick in self.x_ticks:
            found.append(_text(self.x(tick), self.height - BOTTOM + 15, f"{tick:g}", "middle"))
        found.append(_text((LEFT + self.width - RIGHT) / 2, self.height - 5, below, "middle"))
        found.append(_text(4, TOP - 5, beside, "start"))
        return found


def scatter(points: Sequence[Point]) -> str:
    """Each row as a point, the paper's value to the right and ours upwards."""
    if not points:
        return ""
    reach = [
        value
        for point in points
        for value in (point.ours - (point.deviation or 0), point.ours + (point.deviation or 0))
    ]
    axes = _Axes(SIZE, [point.paper for point in points], reach)
    found = axes.frame("paper", "ours")
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: -one.ours):
        x, y = axes.x(point.paper), axes.y(point.ours)
        if point.deviation:
            low, high = (axes.y(point.ours + sign * point.deviation) for sign in (-1, 1))
            found.append(
                f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
        if point.collapsed:
            for rise in (5, -5):
                found.append(
                    f'<line class="cross" x1="{x - 5:.1f}" x2="{x + 5:.1f}" y1="{y - rise:.1f}" '
                    f'y2="{y + rise:.1f}"/>'
                )
        else:
            found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
        height = y + 4
        while any(abs(height - other) < 12 and abs(x - near) < 150 for near, other in taken):
            height += 12  # names do not cover each other
        taken.append((x, height))
        found.append(_text(x + 9, height, point.name))
    return _svg(SIZE, found, f"{len(points)} rows, ours beside the paper's")


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], measures: Mapping[str, str]) -> str:
    """One panel for each measure, in it one curve for each run.

    Args:
        runs: lines of metrics by the name of the run.
        measures: their titles by their names in the lines.
    """
    found: list[str] = []
    for number, (measure, title) in enumerate(measures.items()):
        series = {
            name: [(line["step"], line[measure]) for line in lines if line.get(measure) is not None]
            for name, lines in runs.items()
        }
        drawn = {name: points for name, points in series.items() if points}
        if not drawn:
            continue
        everything = [point for points in drawn.values() for point in points]
        axes = _Axes(PANEL, [0, *(x for x, _ in everything)], [0, *(y for _, y in everything)])
        panel = axes.frame("step", title)
        ends: list[float] = []
        for colour, (name, points) in zip(COLOURS, drawn.items(), strict=False):
            steps, values = (thinned(one, 300) for one in zip(*points, strict=True))
            path = " ".join(
                f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(steps, values, strict=True)
            )
            line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
            height = axes.y(values[-1]) + 4
            while any(abs(height - other) < 13 for other in ends):
                height -= 13
            ends.append(height)
            end = axes.x(steps[-1]) + 8
            label = f'<text x="{end:.1f}" y="{height:.1f}" style="fill:{colour}">{escape(name)}'
            panel += [line, f"{label}</text>"]
        found.append(f'<g transform="translate(0 {number * PANEL[1]})">{"".join(panel)}</g>')
    return _svg((PANEL[0], PANEL[1] * len(found)), found, "curves of the runs")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(size: tuple[int, int], elements: Sequence[str], label: str) -> str:
    width, height = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{STYLE}{"".join(elements)}</svg>'
    )
