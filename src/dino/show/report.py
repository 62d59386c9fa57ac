"""`report.html`: a run on one page that opens without a network and needs no script.

Everything comes from the run folder (`config.json`, `metrics.jsonl`, `results.json`, the teacher's
weights) and, for the pictures, from the data it names. A section appears where its data exist.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from dino.files import UserError, atomic_write, read_json
from dino.models.backbone import Backbone
from dino.runtime import pick_device
from dino.show.curves import Curve, Level, chart
from dino.show.html import figure, page
from dino.show.sections import Pair, attention, component_maps, neighbours, photographs
from dino.weights.load import fingerprint, load, untrained_like


@dataclass(frozen=True)
class Run:
    """What a run folder says in words and numbers.

    Attributes:
        folder: the run folder.
        about: what the run was started on: recipe, data.
        settings: every setting that defines it, by its name on the command line.
        total: steps of the whole run, 0 if unknown.
        metrics: lines of `metrics.jsonl`.
        knn: k-NN accuracies in percent: trained, untrained, pixels; k, bank, queries.
    """

    folder: Path
    about: dict[str, Any]
    settings: dict[str, Any]
    total: int
    metrics: list[dict[str, Any]]
    knn: dict[str, Any]

    def curve(self, *keys: str) -> Curve | None:
        """A measure over the steps, None if it was never measured."""
        points = []
        for line in self.metrics:
            value: Any = line
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((line["step"], value))
        if not points:
            return None
        steps, values = zip(*points, strict=True)
        return Curve(keys[-1], steps, values)


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: if it is none.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json: give the folder of a run")
    config = read_json(folder / "config.json")
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    return Run(
        folder,
        config.get("about", {}),
        config.get("defining", {}),
        config.get("total_steps", 0),
        _lines(folder / "metrics.jsonl"),
        results.get("knn", {}),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last may still be being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def report(run: str | Path, *, device: torch.device | str = "cpu") -> Path:
    """Write `RUN/report.html`.

    Args:
        run: the run folder, finished or not.
        device: where the networks run for the pictures.

    Returns:
        The page.

    Raises:
        UserError: if `run` is no run folder.
    """
    read = read_run(run)
    backbone: Backbone | None = None
    if (read.folder / "teacher.safetensors").exists():
        backbone = load(read.folder, device)
    parts = [
        _header(read, backbone),
        _numbers(read),
        _curves(read),
        *(_pictures(read, backbone) if backbone is not None else []),
        _settings(read, backbone),
    ]
    path = read.folder / "report.html"
    atomic_write(path, page(f"dino: {read.folder.resolve().name}", parts))
    return path


# ------------------------------------------------------------------------------------- words
def _header(run: Run, backbone: Backbone | None) -> str:
    facts = []
    if "data" in run.about:
        count = run.settings.get("data.images")
        facts.append(f"trained on {run.about['data']}" + (f" ({count:,} images)" if count else ""))
    if backbone is not None:
        size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        facts.append(f"{backbone.spec.get('arch', 'backbone')}, {size:.1f} M parameters")
    done = max((line["step"] for line in run.metrics), default=0)
    facts.append(f"{done:,} of {run.total:,} steps" if run.total > done else f"{done:,} steps")
    if "recipe" in run.about:
        facts.append(f"recipe {run.about['recipe']}")
    warnings = [
        f'<p class="warn">At step {line["step"]:,} the run was seen to collapse: '
        f"{escape(str(line['collapse']))}. Its features are not to be trusted.</p>"
        for line in run.metrics
        if line.get("collapse")
    ]
    warnings += [
        f'<p class="warn">At step {line["step"]:,} k-NN lay {line["below_start"]:.1f} points below '
        "the weights that the run began with.</p>"
        for line in [line for line in run.metrics if line.get("below_start")][-1:]
    ]
    refused = max((line.get("refused", 0) for line in run.metrics), default=0)
    if refused:
        warnings.append(
            f'<p class="warn">{refused} steps were refused because loss or gradients were not '
            "finite; refused.jsonl names their images.</p>"
        )
    title = escape(run.folder.resolve().name)
    about = escape(" · ".join(facts))
    return f'<h1>{title}</h1><p class="soft">{about}</p>{"".join(warnings)}'


ROWS = {
    "trained": "trained, without labels",
    "untrained": "same network, untrained",
    "pixels": "raw pixels",
}


def _numbers(run: Run) -> str:
    """The k-NN accuracies, largest on the page."""
    scores = {key: run.knn[key] for key in ROWS if isinstance(run.knn.get(key), (int, float))}
    if not scores:
        return ""
    rows = "".join(
        f'<div class="row"><span>{ROWS[key]}</span><b>{score:.1f} %</b><div class="rail">'
        f'<div class="bar {key}" style="width:{score:.1f}%"></div></div></div>'
        for key, score in scores.items()
    )
    alone = run.knn.get("leave_one_out")
    asked, bank = ("images", "others") if alone else ("test images", "training images")
    exact = f"Each of the {asked} is given the class that its most similar {bank} vote for"
    if all(run.knn.get(key) for key in ("k", "queries", "bank")):
        exact = (
            f"Each of {run.knn['queries']:,} {asked} is given the class that the {run.knn['k']} "
            f"most similar of {run.knn['bank'] - bool(alone):,} {bank} vote for"
        )
    gains = [
        f"{scores['trained'] - scores[key]:+.1f} points against {name}"
        for key, name in (("untrained", "the untrained network"), ("pixels", "raw pixels"))
        if key in scores and "trained" in scores
    ]
    verdict = f" Here: {' and '.join(gains)}." if gains else ""
    caption = (
        f"{exact}; the bars are the shares that come out right. Labels serve this test only, never "
        f"the training. Good: the first bar stands well above the others.{verdict}"
    )
    table = figure(rows, caption, "card")
    return f"<h2>Do the features know what is in a picture?</h2>{table}"


# ------------------------------------------------------------------------------------ curves
def _curves(run: Run) -> str:
    prototypes = run.settings.get("head.prototypes")
    flat = [Level("ln K =", math.log(prototypes))] if prototypes else []
    known = [
        Level(name, run.knn[key])
        for key, name in (("untrained", "untrained"), ("pixels", "raw pixels"))
        if isinstance(run.knn.get(key), (int, float))
    ]
    figures = [
        *(_knn_curve(run, known) or []),
        _measure(
            run.curve("loss"),
            "Loss",
            "Cross-entropy of the student against the teacher, in nats: teacher entropy plus KL. "
            "It often rises first, and falls with the temperatures too, so judge a run by k-NN. "
            "Good: a slow fall after the start, away from ln K.",
            flat,
        ),
        _measure(
            run.curve("teacher_entropy"),
            "Teacher entropy",
            "How undecided the teacher's targets are. At ln K every image gets the same flat "
            "target, at 0 all get one prototype: the two ways to collapse. Good: in between.",
            flat,
        ),
        _measure(
            run.curve("kl"),
            "KL divergence",
            "What the student has yet to learn from the teacher. Good: clearly above 0. At 0 "
            "teacher and student agree on everything, which is collapse.",
        ),
        _measure(
            run.curve("feature_std"),
            "Spread of the features",
            "1 where features fill the sphere evenly, 0 where all images have the same one. "
            "Good: it does not run towards 0.",
        ),
        _measure(
            run.curve("effective_rank"),
            "Effective rank",
            "In how many directions the features of a batch differ. Good: it grows, or stays "
            "well above 1.",
        ),
        _measure(
            run.curve("lr"),
            "Learning rate",
            "Linear warm-up, then a cosine down to its end value: as the settings ask.",
            value=_peak(run.curve("lr")),
        ),
        _speed(run),
    ]
    shown = "".join(figures)
    return f'<h2>How the training went</h2><div class="grid">{shown}</div>' if shown else ""


def _knn_curve(run: Run, known: Sequence[Level]) -> list[str]:
    keys = {key for line in run.metrics for key in line.get("knn") or {}}
    return [
        _measure(
            curve := run.curve("knn", key),
            f"k-NN, k = {key.removeprefix('k')}",
            "Share of images whose neighbours name their class, in percent, while training. "
            "The measure to choose a run or a checkpoint by. Good: it rises above the dashed "
            "lines.",
            [*known, *_start(curve)],
        )
        for key in sorted(keys, key=lambda key: int(key.removeprefix("k")))[-1:]
    ]


def _start(curve: Curve | None) -> list[Level]:
    """Where a run stood that began with weights: it was measured before its first step."""
    return [Level("start", curve.values[0])] if curve and curve.steps[0] == 0 else []


def _measure(
    curve: Curve | None, title: str, caption: str, levels: Sequence[Level] = (), value: str = ""
) -> str:
    """A curve in a frame, its last value (or another) beside the title; nothing without points."""
    if curve is None:
        return ""
    value = value or f"{curve.values[-1]:.3g}"
    head = f"<h3><span>{escape(title)}</span><b>{escape(value)}</b></h3>"
    return figure(head + chart(curve, levels), caption, "card")


def _peak(curve: Curve | None) -> str:
    return f"peak {max(curve.values):.3g}" if curve else ""


def _speed(run: Run) -> str:
    speed, waits = run.curve("images_per_s"), run.curve("data_wait")
    caption = "How many images the whole run trains on in a second."
    if waits is not None:
        share = sum(waits.values) / len(waits.values)
        caption += (
            f" {100 * share:.0f} % of the time went into waiting for them; above 10 %, add workers."
        )
    middle = f"median {statistics.median(speed.values):.3g}" if speed else ""
    return _measure(speed, "Images per second", caption, value=middle)


# ---------------------------------------------------------------------------------- pictures
def _pictures(run: Run, backbone: Backbone) -> list[str]:
    """The sections that need the network and the data; one sentence if the data are gone."""
    data, val = run.about.get("data"), run.about.get("val")
    if not isinstance(data, str):
        return []
    pair = Pair(backbone, untrained_like(backbone))
    try:
        photos, origin = photographs(data, val, backbone.preprocessing.pixels)
        return [
            neighbours(pair, data, val),
            attention(pair, photos, origin),
            component_maps(pair, photos),
        ]
    except UserError as error:
        reason = f"They are left out, since the images cannot be opened: {error}."
        return [f'<h2>Pictures</h2><p class="soft">{escape(reason)}</p>']


def _settings(run: Run, backbone: Backbone | None) -> str:
    rows = dict(run.settings)
    if backbone is not None:
        rows["weights (sha256)"] = fingerprint(backbone)
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<details><summary>All settings</summary><table>{cells}</table></details>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Write the page of a run again: numbers, curves and images."""

    run: str
    """The run folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ReportSettings) -> Path:
    """`dino report`: write the page and print its path."""
    path = report(settings.run, device=pick_device(settings.device))
    print(path)
    return path
