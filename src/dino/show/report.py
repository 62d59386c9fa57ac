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
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        about: recipe and data of the run.
        settings: every setting that defines it, by its name on the command line.
        total: steps of the full run, 0 if unknown.
        metrics: lines of `metrics.jsonl`, each with a finite "step".
        knn: k-NN accuracies in percent: trained, untrained, pixels; k, bank, queries.
        problems: sentences about files that could not be read.
    """

    folder: Path
    about: dict[str, Any]
    settings: dict[str, Any]
    total: int
    metrics: list[dict[str, Any]]
    knn: dict[str, Any]
    problems: list[str]

    def curve(self, *keys: str) -> Curve | None:
        """A measure over the steps, None if it was never measured."""
        points = []
        for line in self.metrics:
            value: Any = line
            for key in keys:
                value = _dict(value).get(key)
            if _finite(value):
                points.append((line["step"], value))
        if not points:
            return None
        steps, values = zip(*points, strict=True)
        return Curve(keys[-1], steps, values)

    @property
    def scores(self) -> dict[str, float]:
        """The k-NN accuracies that are numbers, in the order of `NETWORKS`."""
        return {key: self.knn[key] for key in NETWORKS if _finite(self.knn.get(key))}


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: if it has no readable `config.json`.
    """
    folder = Path(folder)
    if not _exists(folder / "config.json"):
        raise UserError(f"{folder} holds no config.json: give the folder of a run")
    config, problems = _dict(read_json(folder / "config.json")), list[str]()
    metrics, results = list[dict[str, Any]](), {}
    try:
        if _exists(folder / "metrics.jsonl"):
            metrics, ignored = _metrics(folder / "metrics.jsonl")
            if ignored:
                problems.append(f"{ignored} lines of metrics.jsonl are no metrics and were ignored")
        if _exists(folder / "results.json"):
            results = _dict(read_json(folder / "results.json"))
    except (UserError, OSError) as error:
        problems.append(str(error))
    total = config.get("total_steps")
    return Run(
        folder,
        _dict(config.get("about")),
        _dict(config.get("defining")),
        total if isinstance(total, int) else 0,
        metrics,
        _dict(results.get("knn")),
        problems,
    )


def _exists(path: Path) -> bool:
    """Whether there is such a file; a folder, or a pipe, which may never end, is an error."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file")
    return path.exists()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines that are metrics, and the number of others; the last may be incomplete."""
    metrics, ignored = [], 0
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            entry = _dict(json.loads(line))
        except (ValueError, RecursionError):
            entry = {}
        if _finite(entry.get("step")):
            metrics.append(entry)
        else:
            ignored += 1
    return metrics, ignored


def report(run: str | Path, *, device: torch.device | str = "cpu") -> Path:
    """Write `RUN/report.html`.

    Args:
        run: the run folder, finished or not.
        device: where the networks run for the images.

    Returns:
        The page.

    Raises:
        UserError: if `run` is no run folder.
        OSError: if the page cannot be written.
    """
    content = read_run(run)
    backbone: Backbone | None = None
    if (content.folder / "teacher.safetensors").exists():
        try:
            backbone = load(content.folder, device)
        except (UserError, OSError, RuntimeError) as error:
            content.problems.append(f"the weights cannot be read: {error}")
    name = content.folder.resolve().name
    parts = [
        _section(name, lambda: _header(content, backbone), "h1"),
        *(f'<p class="warn">{escape(problem)}.</p>' for problem in content.problems),
        _section("k-NN accuracy", lambda: _accuracies(content)),
        _section("How the training went", lambda: _curves(content)),
        *(_images(content, backbone) if backbone is not None else []),
        _section("All settings", lambda: _settings(content, backbone)),
    ]
    path = content.folder / "report.html"
    # Names of files may hold bytes that are not UTF-8: they become question marks.
    atomic_write(path, page(f"dino: {name}", parts).encode("utf-8", "replace"))
    return path


def _section(title: str, draw: Callable[[], str], tag: str = "h2") -> str:
    """A section of the page; where it cannot be drawn, its title and the reason."""
    try:
        return draw()
    except Exception as error:  # whatever a damaged run, image or network leads to
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        text = f"This section is left out, since it cannot be drawn: {reason}."
        return f'<{tag}>{escape(title)}</{tag}><p class="soft">{escape(text)}</p>'


# ------------------------------------------------------------------------------------- words
def _header(run: Run, backbone: Backbone | None) -> str:
    facts = []
    if "data" in run.about:
        count = run.settings.get("data.images")
        images = f" ({count:,} images)" if _finite(count) else ""
        facts.append(f"trained on {run.about['data']}{images}")
    if backbone is not None:
        size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        facts.append(f"{backbone.spec.get('arch', 'backbone')}, {size:.1f} M parameters")
    done = max((line["step"] for line in run.metrics), default=0)
    facts.append(f"{done:,} of {run.total:,} steps" if run.total > done else f"{done:,} steps")
    if "recipe" in run.about:
        facts.append(f"recipe {run.about['recipe']}")
    warnings = [
        f"At step {line['step']:,} the run collapsed: {line['collapse']}. Do not use its features."
        for line in run.metrics
        if line.get("collapse")
    ]
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
    paragraphs = "".join(f'<p class="warn">{escape(warning)}</p>' for warning in warnings)
    about = escape(" · ".join(facts))
    return f'<h1>{escape(run.folder.resolve().name)}</h1><p class="soft">{about}</p>{paragraphs}'


NETWORKS = {
    "trained": "the network, trained without labels",
    "untrained": "the untrained network",
    "pixels": "raw pixels",
}
"""The rows of the k-NN accuracies."""


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
    protocol = f"Each of the {queries} is given the class that its most similar {bank} vote for"
    if all(_finite(knn.get(key)) for key in ("k", "queries", "bank")):
        protocol = (
            f"Each of {knn['queries']:,} {queries} is given the class that the {knn['k']} "
            f"most similar of {knn['bank'] - alone:,} {bank} vote for"
        )
    trained = scores.pop("trained", None)
    gains = (
        ""
        if trained is None
        else ", ".join(
            f"{trained - score:+.1f} points against {NETWORKS[key]}"
            for key, score in scores.items()
        )
    )
    caption = (
        f"{protocol}; the bars are the shares of right classes. Labels are used by this test only, "
        f"not by the training. Good: the first bar is well above the others. {gains}"
    )
    return f"<h2>k-NN accuracy of the features</h2>{figure(rows, caption.strip(), 'card')}"


# ------------------------------------------------------------------------------------ curves
CURVES = {
    "loss": (
        "Loss",
        "Cross-entropy of student and teacher in nats: teacher entropy plus KL. It also follows "
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
    uniform = [Level("ln K =", math.log(prototypes))] if _finite(prototypes) and prototypes else []
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
    names = {key for line in run.metrics for key in _dict(line.get("knn"))}
    ks = [int(name[1:]) for name in names if name[:1] == "k" and name[1:].isdecimal()]
    if not ks:
        return ""
    curve = run.curve("knn", f"k{max(ks)}")
    levels = [
        Level(key.replace("pixels", "raw pixels"), score)
        for key, score in run.scores.items()
        if key != "trained"
    ]
    if curve and curve.steps[0] == 0:  # a run from weights is measured before its first step
        levels.append(Level("start", curve.values[0]))
    caption = (
        "Share of images whose neighbours vote for their class, in percent. Choose a run or a "
        "checkpoint by this measure. Good: it rises above the dashed lines."
    )
    return _measure(curve, f"k-NN, k = {max(ks)}", caption, levels)


def _measure(
    curve: Curve | None, title: str, caption: str, levels: Sequence[Level] = (), value: str = ""
) -> str:
    """A curve in a frame, its last value (or another) beside the title; empty without points."""
    if curve is None:
        return ""
    value = value or f"{curve.values[-1]:.3g}"
    head = f"<h3><span>{escape(title)}</span><b>{escape(value)}</b></h3>"
    return figure(head + chart(curve, levels), caption, "card")


# ---------------------------------------------------------------------------------- images
def _images(run: Run, backbone: Backbone) -> list[str]:
    """The sections that need the network and the data."""
    data, val = run.about.get("data"), run.about.get("val")
    if not isinstance(data, str):
        return []
    pair = Pair(backbone, untrained_like(backbone))
    try:
        photos, origin = photographs(data, val, backbone.preprocessing.pixels)
    except Exception as error:
        reason = f"They are left out, since the images cannot be opened: {error}."
        return [f'<h2>Images</h2><p class="soft">{escape(reason)}</p>']
    return [
        _section("Nearest neighbours", lambda: neighbours(pair, data, val)),
        _section("Attention", lambda: attention(pair, photos, origin)),
        _section("Components of the patch features", lambda: component_maps(pair, photos)),
    ]


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

    run: str
    """The run folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ReportSettings) -> Path:
    """`dino report`: write the page and print its path."""
    path = report(settings.run, device=pick_device(settings.device))
    print(path)
    return path
