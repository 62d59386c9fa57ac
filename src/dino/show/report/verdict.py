"""The verdict on a run, from its measures: with labels, and without.

Without labels four measures are read, means of the last `LINES` lines of metrics, and compared
with bands. They detect a collapse; they cannot show that the features are useful. With labels k-NN
of the trained network is compared with that of the untrained one and of raw pixels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Literal

from dino.distillation.collapse import ADVICE
from dino.show.html import figure
from dino.show.report.curves import Healthy
from dino.show.report.run_contents import NETWORKS, Run, finite

LINES = 5
"""Of `metrics.jsonl`: the mean of so many is read, since each is of one batch."""

EARLY = 0.1
"""Share of the run in which flat targets and a small spread are normal and nothing is judged."""

Status = Literal["healthy", "doubtful", "failed", "open"]


@dataclass(frozen=True)
class Band:
    """The values of a measure in healthy runs.

    Attributes:
        measure: its key in the metrics.
        title: its name on the page.
        low: smallest healthy value.
        high: largest healthy value.
        failed_below: a smaller value is a failure.
        failed_above: a larger value is a failure.
        relative: whether values are shares of ln K.
        below: what a value below the band means.
        above: what a value above the band means.
        collapse: those of `ADVICE` that a failure below, and one above the band, are.
        batch: with fewer images in a batch the measure is not judged.
    """

    measure: str
    title: str
    low: float
    high: float = math.inf
    failed_below: float = -math.inf
    failed_above: float = math.inf
    relative: bool = False
    below: str = ""
    above: str = ""
    collapse: tuple[str, str] = ("", "")
    batch: int = 0

    def status(self, value: float) -> Status:
        """Where a value lies."""
        if not self.failed_below <= value <= self.failed_above:
            return "failed"
        return "healthy" if self.low <= value <= self.high else "doubtful"

    @property
    def unit(self) -> str:
        """What stands behind a value."""
        return " ln K" if self.relative else ""

    def words(self) -> str:
        """The band, as it is shown."""
        if math.isinf(self.high):
            return f"at least {self.low:g}{self.unit}"
        return f"{self.low:g} to {self.high:g}{self.unit}"


BANDS = (
    Band(
        "teacher_entropy",
        "Teacher entropy",
        low=0.03,
        high=0.97,
        failed_below=0.01,
        failed_above=0.99,
        relative=True,
        below="almost all images have the same prototype",
        above="the targets are almost uniform, so that nothing is learned from them",
        collapse=("one prototype", "uniform"),
    ),
    Band(
        "kl",
        "KL divergence",
        low=0.01,
        relative=True,
        below="the student has nothing left to learn from the teacher",
    ),
    Band(
        "feature_std",
        "Spread of the features",
        low=0.3,
        failed_below=0.05,
        below="the features of different images are almost equal",
    ),
    Band(
        "effective_rank",
        "Effective rank",
        low=5,
        failed_below=1.5,
        below="the features differ in few directions only",
        batch=32,
    ),
)
"""From runs of the demo and from definitions; docs/report.md has the numbers.

* Entropy, KL: the limits .01 and .99 are those of `CollapseMonitor`. Runs of the demo that learned
  ended at .30 and .42 ln K with KL at .05 and .09; one without sharpening, which learned nothing,
  at 1.00 and .0001; one without centering and with a large learning rate, worse than untrained, at
  .002 and .02.
* Spread: its square is at most 1 minus the mean cosine similarity of the features, so .3 means a
  mean cosine of up to .91, and .05 one of up to .998. Healthy runs had .77 and .88. It says nothing
  about the two failures: there it was .59 and .78.
* Rank: 10.6 and 13.6 in the healthy runs, 4.4 in the one without centering; it is near 1 if all
  features lie on a line. It is at most the batch minus 1, so small batches are not judged.
"""


@dataclass(frozen=True)
class Reading:
    """A measure, its value and its healthy values in words, and what follows from it.

    `collapse` is the one that a failure is, and `measure` the key in the metrics.
    """

    title: str
    value: str
    healthy: str
    status: Status
    meaning: str = ""
    collapse: str = ""
    measure: str = ""

    def advice(self, run: Run) -> str:
        """What is wrong and what to try, in sentences; empty for a healthy measure."""
        if self.status not in ("doubtful", "failed"):
            return ""
        return " ".join(
            [f"{self.status.capitalize()}: {self.meaning}.", *_advice(run, self.collapse)]
        )


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run: its status, one or few words, sentences, and what it rests on."""

    status: Status
    words: str
    sentences: list[str]
    readings: list[Reading]


def judge(run: Run) -> Verdict | None:
    """The verdict on a run; None where nothing was measured yet."""
    leads = [*_leads(run)]
    readings = [*measured(run), *leads, *_knn_so_far(run)]
    if not readings:
        return None
    so_far = "" if run.finished else " so far"
    found = {
        status: [f"{r.title} is {r.value}: {r.meaning}." for r in readings if r.status == status]
        for status in ("failed", "doubtful")
    }
    if collapse := next((line for line in run.metrics if line.get("collapse")), None):
        kind = str(collapse["collapse"])
        sentences = [f"At step {collapse['step']:,} the run collapsed: {kind}. {DO_NOT_USE}"]
        return Verdict("failed", "collapsed", [*sentences, *_advice(run, kind)], readings)
    if found["failed"]:
        advice = [s for r in readings if r.status == "failed" for s in _advice(run, r.collapse)]
        return Verdict("failed", "failed", [*found["failed"], DO_NOT_USE, *advice], readings)
    if found["doubtful"]:
        return Verdict("doubtful", f"doubtful{so_far}", found["doubtful"], readings)
    if _early(run):
        return Verdict("open", "too early to tell", [EARLY_SENTENCE], readings)
    if len(leads) == 2:
        return Verdict("healthy", f"good{so_far}", [GOOD], readings)
    return Verdict("healthy", f"healthy{so_far}", [HEALTHY], readings)


DO_NOT_USE = "Do not use its features; docs/recipes.md says what to try."
EARLY_SENTENCE = f"In the first {EARLY:.0%} of a run flat targets and similar features are normal."
GOOD = (
    "The training shows no sign of a collapse, and the features classify more images rightly than "
    "those of the same network untrained, and than raw pixels."
)
HEALTHY = (
    "There is no sign of a collapse. Whether the features are useful cannot be measured without "
    "labels: look at the nearest neighbours, or give a few hundred images with classes to "
    "dino evaluate knn --baseline."
)


def _advice(run: Run, collapse: str) -> list[str]:
    """What to try after a collapse; empty for anything else."""
    if collapse not in ADVICE:
        return []
    advice = ADVICE[collapse].format(limit=_limit(run))
    return [f"{advice[0].upper()}{advice[1:]}."]


def _early(run: Run) -> bool:
    return run.done < EARLY * run.total


def _limit(run: Run) -> float:
    """The entropy of uniform targets, ln K; NaN where K is unknown."""
    prototypes = run.settings.get("head.prototypes")
    return math.log(prototypes) if finite(prototypes) and prototypes > 1 else math.nan


def healthy(run: Run, measure: str) -> Healthy | None:
    """The healthy values of a measure of a run, in its unit; None where none are known."""
    band = next((band for band in BANDS if band.measure == measure), None)
    scale = _limit(run) if band is not None and band.relative else 1.0
    batch = run.settings.get("run.batch")
    if band is None or math.isnan(scale) or (finite(batch) and batch < band.batch):
        return None
    return Healthy(scale * band.low, scale * band.high)


def measured(run: Run) -> Iterator[Reading]:
    """The measures that need no labels."""
    for band in BANDS:
        curve, scale = run.curve(band.measure), _limit(run) if band.relative else 1.0
        if curve is None or math.isnan(scale):
            continue
        value = statistics.fmean(curve.values[-LINES:]) / scale
        status = band.status(value)
        batch = run.settings.get("run.batch")
        if (status != "healthy" and _early(run)) or (finite(batch) and batch < band.batch):
            status = "open"
        high = value > band.high
        meaning, collapse = (band.above if high else band.below), band.collapse[high]
        words = f"{value:.3g}{band.unit}", band.words()
        yield Reading(band.title, *words, status, meaning, collapse, band.measure)


def _leads(run: Run) -> Iterator[Reading]:
    """How far k-NN of the trained network is ahead at the end, and whether that may be chance."""
    queries = run.knn.get("queries")
    if "trained" not in run.scores or not finite(queries) or queries < 1:
        return
    for key in ("untrained", "pixels"):
        if key not in run.scores:
            continue
        shares = [min(max(run.scores[name] / 100, 0), 1) for name in ("trained", key)]
        margin = 200 * math.sqrt(sum(share * (1 - share) for share in shares) / queries)
        lead = run.scores["trained"] - run.scores[key]
        yield Reading(
            f"k-NN, lead over {NETWORKS[key]}",
            f"{lead:+.1f} ± {margin:.1f} points",
            f"above {margin:.1f}",
            "healthy" if lead > margin else "doubtful",
            f"these features are no better than {NETWORKS[key]}, or too few images were classified",
        )


def _knn_so_far(run: Run) -> Iterator[Reading]:
    """k-NN while training, until the final comparison is there."""
    if (curve := run.knn_curve()) is None or run.scores:
        return
    steps, values = curve.steps, curve.values
    rise = values[-1] - values[0]
    yield Reading(
        f"k-NN, k = {curve.name.removeprefix('knn k')}",
        f"{values[-1]:.1f} % at step {steps[-1]:,}, {values[0]:.1f} % at step {steps[0]:,}",
        "rises",
        "doubtful" if rise < -1 else "healthy" if rise > 1 else "open",
        "the features became worse while training",
    )


SOURCES = (
    f"Each measure is the mean of the last {LINES} lines of metrics. docs/report.md says where the "
    "healthy values come from."
)
ERRORS = " k-NN: ± is two standard errors of the difference."
WORDS: dict[Status, str] = {
    "healthy": "healthy",
    "doubtful": "doubtful",
    "failed": "failed",
    "open": "not judged",
}


def verdict_section(run: Run) -> str:
    """The verdict as a section of the page; empty where nothing was measured yet."""
    if (verdict := judge(run)) is None:
        return ""
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences)
    rows = "".join(
        f"<tr><td>{escape(one.title)}</td><td>{escape(one.value)}</td>"
        f'<td>{escape(one.healthy)}</td><td class="{one.status}">{WORDS[one.status]}</td></tr>'
        for one in verdict.readings
    )
    head = "<tr><th>measure</th><th>value</th><th>healthy</th><th>verdict</th></tr>"
    table = f"<table>{head}{rows}</table>"
    title = f'<h2 class="{verdict.status}">Verdict: {escape(verdict.words)}</h2>'
    return title + sentences + figure(table, SOURCES + ERRORS * bool(run.scores), "card")
