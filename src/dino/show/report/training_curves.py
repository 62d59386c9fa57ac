"""The measures of the training as curves, with healthy values and advice: of one run or several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from dino.show.html import figure, legend
from dino.show.report.curves import Curve, Healthy, Level, chart, letter
from dino.show.report.run_contents import Run, finite
from dino.show.report.verdict import healthy, measured

CURVES = {
    "loss": (
        "Loss",
        "Cross-entropy of student and teacher in nats: teacher entropy plus KL. It depends on "
        "the temperatures, so judge a run by k-NN. Good: a slow fall after the start, away from "
        "ln K.",
    ),
    "teacher_entropy": (
        "Teacher entropy",
        "Of the teacher's targets. At ln K every image has the same uniform target, at 0 all have "
        "one prototype: the two ways to collapse. Good: in between.",
    ),
    "kl": (
        "KL divergence",
        "Between the teacher's targets and the student. At 0 the run has collapsed. Good: clearly "
        "above 0.",
    ),
    "feature_std": (
        "Spread of the features",
        "1 where features fill the sphere evenly, 0 where all images have the same one. Good: it "
        "does not approach 0.",
    ),
    "effective_rank": (
        "Effective rank",
        "The number of directions in which the features of a batch differ. Good: it grows, or "
        "stays well above 1.",
    ),
    "lr": ("Learning rate", "Linear warm-up, then a cosine to its end value, as set."),
    "images_per_s": ("Images per second", "Of the entire run."),
}
"""Title and caption of each measure of the training."""


HEALTHY = legend('<i class="key"></i> healthy values')


def curves_section(runs: Sequence[Run]) -> str:
    """A chart for each measure that was logged, with the curves of all runs; empty without any."""
    figures = [_knn_chart(runs)]
    for name, (title, caption) in CURVES.items():
        found = [(run, curve) for run in runs if (curve := run.curve(name)) is not None]
        levels = [] if name not in ("loss", "teacher_entropy") else _uniform(runs)
        value, advice = "", ""
        if len(runs) == 1 and found:
            value, more = _summary(runs[0], name)
            caption += more
            readings = [one for one in measured(runs[0]) if one.measure == name]
            advice = " ".join(one.advice(runs[0]) for one in readings)
        bands = {healthy(run, name) for run, _ in found}
        band = bands.pop() if len(bands) == 1 else None
        figures.append(_figure(runs, found, title, caption, levels, value, band, advice))
    drawn = "".join(figures)
    key = HEALTHY if "healthy-band" in drawn else ""
    title = "<h2>How the training went</h2>"
    return f'{title}{key}<div class="grid">{drawn}</div>' if drawn else ""


def _uniform(runs: Sequence[Run]) -> list[Level]:
    """The entropy of uniform targets, where all runs have as many prototypes and targets."""
    if any(run.settings.get("optim.loss", "cross_entropy") != "cross_entropy" for run in runs):
        return []
    counts = {run.settings.get("head.prototypes") for run in runs}
    count = counts.pop()
    return [] if counts or not finite(count) or count < 2 else [Level("ln K =", math.log(count))]


def _summary(run: Run, name: str) -> tuple[str, str]:
    """What stands beside the title of a measure if not its last value, and more of its caption."""
    curve = run.curve(name)
    assert curve is not None
    if name == "lr":
        return f"peak {max(curve.values):.3g}", ""
    if name != "images_per_s":
        return "", ""
    more = ""
    if waits := run.curve("data_wait"):
        share = 100 * statistics.fmean(waits.values)
        more = f" {share:.0f} % of the time was spent waiting for images; above 10 %, add workers."
    return f"median {statistics.median(curve.values):.3g}", more


def _knn_chart(runs: Sequence[Run]) -> str:
    found = [(run, curve) for run in runs if (curve := run.knn_curve()) is not None]
    ks = {curve.name.removeprefix("knn k") for _, curve in found}
    levels = []
    if len(runs) == 1 and found:
        levels = [
            Level(key.replace("pixels", "raw pixels"), score)
            for key, score in runs[0].scores.items()
            if key != "trained"
        ]
        curve = found[0][1]
        if curve.steps[0] == 0:  # a run from weights is measured before its first step
            levels.append(Level("start", curve.values[0]))
    caption = (
        "Share of images whose neighbours vote for their class, in percent. Choose a run or a "
        "checkpoint by this measure. Good: it rises"
    )
    caption += " above the dashed lines." if levels else "."
    return _figure(runs, found, f"k-NN, k = {' and '.join(sorted(ks))}", caption, levels)


def _figure(
    runs: Sequence[Run],
    found: Sequence[tuple[Run, Curve]],
    title: str,
    caption: str,
    levels: Sequence[Level] = (),
    value: str = "",
    band: Healthy | None = None,
    advice: str = "",
) -> str:
    """Curves in a frame, of one run its last value beside the title; empty without curves."""
    if not found:
        return ""
    curves: list[Curve | None] = [None] * len(runs)
    for run, curve in found:
        named = curve if len(runs) == 1 else curve._replace(name=letter(runs.index(run)))
        curves[runs.index(run)] = named
    value = value or (f"{found[0][1].values[-1]:.3g}" if len(runs) == 1 else "")
    head = f"<h3><span>{title}</span><b>{value}</b></h3>"
    said = f'<p class="advice">{escape(advice)}</p>' if advice else ""
    return figure(head + chart(curves, levels, band) + said, caption, "card")
