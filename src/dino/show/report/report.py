"""`report.html`: a run on one page that opens without a network and needs no script.

Everything comes from the run folder (`config.json`, `metrics.jsonl`, `results.json`, the teacher's
weights) and, for the images, from the data of the run. A section appears where its data exist; what
cannot be read or drawn becomes a sentence on the page, never an error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro

from dino.files import UserError, atomic_write
from dino.models.backbone import Backbone
from dino.runtime import pick_device
from dino.show.html import figure, page
from dino.show.report.curves import Curve, Level, chart
from dino.show.report.evaluations import evaluations_section
from dino.show.report.origin import date, origin_section
from dino.show.report.run_contents import NETWORKS, Run, finite
from dino.show.report.sections import Pair, attention, component_maps, neighbours, photographs
from dino.show.report.verdict import verdict_section
from dino.weights.load import fingerprint, load, untrained_like


def report(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    images: bool = True,
    refresh: int | None = None,
) -> Path:
    """Write `RUN/report.html`.

    Args:
        run: the run folder, finished or not.
        device: where the networks run for the images.
        images: also draw what needs the weights and the data, which takes longest.
        refresh: seconds after which a browser loads the page again, for a run that goes on.

    Returns:
        The page.

    Raises:
        UserError: if `run` is no run folder.
        OSError: if the page cannot be written.
    """
    content = Run(run)
    backbone: Backbone | None = None
    if images and (content.folder / "teacher.safetensors").exists():
        try:
            backbone = load(content.folder, device)
        except (UserError, OSError, RuntimeError) as error:
            content.problems.append(f"the weights cannot be read: {error}")
    name = content.folder.resolve().name
    sections = [
        _section(name, lambda: _header(content), "h1"),
        *(f'<p class="warn">{escape(problem)}.</p>' for problem in content.problems),
        _section("Verdict", lambda: verdict_section(content)),
        _section("k-NN accuracy", lambda: _accuracies(content)),
        _section("Evaluations", lambda: evaluations_section(content)),
        _section("How the training went", lambda: _curves(content)),
        _section("This run", lambda: origin_section(content)),
        NO_IMAGES if not images else "",
        "" if backbone is None else _section("Images", lambda: _images(content, backbone)),
        _section("All settings", lambda: _settings(content, backbone)),
    ]
    path = content.folder / "report.html"
    # Names of files may hold bytes that are not UTF-8: they become question marks.
    html = page(f"dino: {name}", sections, refresh)
    atomic_write(path, html.encode("utf-8", "replace"))
    return path


NO_IMAGES = (
    '<p class="soft">Nearest neighbours, attention and components are drawn at the end of the run. '
    "To draw them now: dino report RUN</p>"
)


def _section(title: str, draw: Callable[[], str], tag: str = "h2") -> str:
    """A section of the page; where it cannot be drawn, its title and the reason."""
    try:
        return draw()
    except Exception as error:  # whatever a damaged run, image or network leads to
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        text = f"This section is left out, since it cannot be drawn: {reason}."
        return f'<{tag}>{escape(title)}</{tag}><p class="soft">{escape(text)}</p>'


# ------------------------------------------------------------------------------------- words
def _header(run: Run) -> str:
    facts = []
    if "data" in run.about:
        count = run.settings.get("data.images")
        images = f" ({count:,} images)" if finite(count) else ""
        facts.append(f"trained on {run.about['data']}{images}")
    if arch := run.settings.get("model.arch"):
        patch = run.settings.get("model.patch_size")
        facts.append(f"{arch}, patch {patch}" if patch else f"{arch}")
    facts.append(f"{run.done:,} of {run.total:,} steps" if run.total else f"{run.done:,} steps")
    if "recipe" in run.about:
        facts.append(f"recipe {run.about['recipe']}")
    facts.append(f"page of {date(datetime.now().astimezone().isoformat())}")
    warnings = []
    if below := run.curve("below_start"):
        warnings.append(
            f"At step {below.steps[-1]:,} k-NN was {below.values[-1]:.1f} points below the weights "
            "from which the run started."
        )
    refused = run.curve("refused")
    if refused and max(refused.values):
        warnings.append(
            f"{max(refused.values)} steps were refused because loss or gradients were not finite; "
            "refused.jsonl names their images."
        )
    skipped = run.curve("skipped")
    if skipped and max(skipped.values):
        warnings.append(
            f"{max(skipped.values):,} images could not be used; skipped.csv names them."
        )
    paragraphs = "".join(f'<p class="warn">{escape(warning)}</p>' for warning in warnings)
    about = escape(" · ".join(facts))
    return f'<h1>{escape(run.folder.resolve().name)}</h1><p class="soft">{about}</p>{paragraphs}'


def _accuracies(run: Run) -> str:
    """The k-NN accuracies as bars."""
    scores, knn = run.scores, run.knn
    if not scores:
        return ""
    rows = "".join(
        f'<div class="row"><span>{NETWORKS[key]}</span><b>{score:.1f} %</b><div class="rail">'
        f'<div class="bar {key}" style="width:{score:.1f}%"></div></div></div>'
        for key, score in scores.items()
    )
    alone = bool(knn.get("leave_one_out"))
    queries, bank = ("images", "others") if alone else ("test images", "training images")
    gains = [
        f"{scores['trained'] - scores[key]:+.1f} points against {NETWORKS[key]}"
        for key in scores
        if key != "trained" and "trained" in scores
    ]
    caption = (
        f"Each of {knn['queries']:,} {queries} is given the class that the {knn['k']} most similar "
        f"of {knn['bank'] - alone:,} {bank} vote for; the bars are the shares of right classes. "
        "Labels are used by this test only, not by the training. Good: the first bar is well above "
        f"the others. {', '.join(gains)}"
    )
    return f"<h2>k-NN accuracy of the features</h2>{figure(rows, caption.strip(), 'card')}"


# ------------------------------------------------------------------------------------ curves
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


def _curves(run: Run) -> str:
    prototypes = run.settings.get("head.prototypes", 0)
    distributions = run.settings.get("optim.loss", "cross_entropy") == "cross_entropy"
    limit = finite(prototypes) and prototypes and distributions
    uniform = [Level("ln K =", math.log(prototypes))] if limit else []
    figures = [_knn_curve(run)]
    for name, (title, caption) in CURVES.items():
        curve, value = run.curve(name), ""
        if curve and name == "lr":
            value = f"peak {max(curve.values):.3g}"
        if curve and name == "images_per_s":
            value = f"median {statistics.median(curve.values):.3g}"
            if waits := run.curve("data_wait"):
                share = 100 * statistics.fmean(waits.values)
                caption += f" {share:.0f} % of the time was spent waiting for images; above 10 %, "
                caption += "add workers."
        levels = uniform if name in ("loss", "teacher_entropy") else []
        figures.append(_measure(curve, title, caption, levels, value))
    drawn = "".join(figures)
    return f'<h2>How the training went</h2><div class="grid">{drawn}</div>' if drawn else ""


def _knn_curve(run: Run) -> str:
    if (curve := run.knn_curve()) is None:
        return ""
    levels = [
        Level(key.replace("pixels", "raw pixels"), score)
        for key, score in run.scores.items()
        if key != "trained"
    ]
    if curve.steps[0] == 0:  # a run from weights is measured before its first step
        levels.append(Level("start", curve.values[0]))
    caption = (
        "Share of images whose neighbours vote for their class, in percent. Choose a run or a "
        "checkpoint by this measure. Good: it rises above the dashed lines."
    )
    return _measure(curve, f"k-NN, k = {curve.name.removeprefix('knn k')}", caption, levels)


def _measure(
    curve: Curve | None, title: str, caption: str, levels: Sequence[Level] = (), value: str = ""
) -> str:
    """A curve in a frame, its last value (or another) beside the title; empty without points."""
    if curve is None:
        return ""
    value = value or f"{curve.values[-1]:.3g}"
    head = f"<h3><span>{title}</span><b>{value}</b></h3>"
    return figure(head + chart(curve, levels), caption, "card")


# ---------------------------------------------------------------------------------- images
def _images(run: Run, backbone: Backbone) -> str:
    """The sections that need the network and the data."""
    data, val = run.about.get("data"), run.about.get("val")
    if not isinstance(data, str):
        return ""
    pair = Pair(backbone, untrained_like(backbone))
    photos, origin = photographs(data, val, backbone.preprocessing.pixels)
    return (
        _section("Nearest neighbours", lambda: neighbours(pair, data, val))
        + _section("Attention", lambda: attention(pair, photos, origin))
        + _section("Components of the patch features", lambda: component_maps(pair, photos))
    )


def _settings(run: Run, backbone: Backbone | None) -> str:
    rows = dict(run.settings)
    if backbone is not None:
        rows["weights (sha256)"] = fingerprint(backbone)
    cells = ""
    for name, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value)
        cells += f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
    return f"<details><summary>All settings</summary><table>{cells}</table></details>"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Write the page of a run again: numbers, curves and images."""

    renamed: ClassVar[dict[str, str]] = {"run": "weights"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ReportSettings) -> Path:
    """`dino report`: write the page and print its path."""
    path = report(settings.weights, device=pick_device(settings.device))
    print(path)
    return path
