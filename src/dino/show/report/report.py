"""`report.html`: a run on one page that opens without a network; `dino report` writes it.

Everything comes from the run folder (`config.json`, `metrics.jsonl`, `results.json`, the teacher's
weights) and, for the images, from the data of the run. A section appears where its data exist; what
cannot be read or drawn becomes a sentence on the page, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro

from dino.files import UserError, atomic_write, check_output
from dino.models.backbone import Backbone
from dino.runtime import pick_device
from dino.settings import validated
from dino.show.html import RUNS, figure, page, section
from dino.show.report.comparison import comparison
from dino.show.report.evaluations import evaluations_section
from dino.show.report.neighbours import neighbours
from dino.show.report.origin import date, origin_section
from dino.show.report.patch_maps import attention, component_maps
from dino.show.report.photographs import photographs
from dino.show.report.run_contents import NETWORKS, Run, finite
from dino.show.report.similarity import Frame, similarity
from dino.show.report.skipped import skipped_section
from dino.show.report.snapshots import snapshots_section, take_missing
from dino.show.report.training_curves import curves_section
from dino.show.report.verdict import verdict_section
from dino.show.report.views import views_section
from dino.show.report.watch import watch
from dino.weights.load import fingerprint, load, untrained_like

WATCHED = 15
"""Seconds after which a browser loads a page that is written by --watch again."""


def report(
    run: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    device: torch.device | str = "cpu",
    images: bool = True,
    refresh: int | None = None,
) -> Path:
    """Write the page of a run, or one that compares several.

    Args:
        run: the run folder, finished or not; several for a comparison, at most `html.RUNS`.
        out: the file; by default `RUN/report.html`. A comparison needs one.
        device: where the networks run for the images.
        images: also draw what needs the weights and the data, which takes longest.
        refresh: seconds after which a browser loads the page again, for a run that goes on.

    Returns:
        The page.

    Raises:
        UserError: if a folder is no run, or there are too many.
        OSError: if the page cannot be written.
    """
    folders = [run] if isinstance(run, (str, Path)) else list(run)
    path = report_path(folders, out)
    contents = [Run(folder) for folder in folders]
    backbones = [_backbone(content, device) if images else None for content in contents]
    if len(contents) > 1:
        html = comparison(contents, backbones, refresh)
    else:
        html = _page(contents[0], backbones[0], images, refresh)
    # Names of files may hold bytes that are not UTF-8: they become question marks.
    atomic_write(path, html.encode("utf-8", "replace"))
    return path


def report_path(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """The file that a page of these runs is written to.

    Raises:
        UserError: if there are too many runs, one is given twice, or several need `out`.
    """
    if not 1 <= len(folders) <= RUNS:
        raise UserError(f"{len(folders)} runs are given: a page shows from 1 to {RUNS}")
    paths = [Path(folder).resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise UserError("a run is given twice: name each once")
    if len(folders) > 1 and out is None:
        raise UserError("a comparison of several runs needs --out: for example --out runs.html")
    return Path(folders[0]) / "report.html" if out is None else Path(out)


def _backbone(run: Run, device: torch.device | str) -> Backbone | None:
    """The network of a run; None, and a problem of the run, where it cannot be read."""
    if not (run.folder / "teacher.safetensors").exists():
        return None
    try:
        return load(run.folder, device)
    except (UserError, OSError, RuntimeError) as error:
        run.problems.append(f"the weights cannot be read: {error}")
        return None


def _page(run: Run, backbone: Backbone | None, images: bool, refresh: int | None) -> str:
    """The page of one run."""
    frames: list[Frame] = []

    def while_it_trained() -> str:
        if images:
            with suppress(UserError):  # of weights or images, which other sections state
                take_missing(run)
        return snapshots_section(run)

    sections = [
        section(run.name, lambda: _header(run), "h1"),
        *(f'<p class="warn">{escape(problem)}.</p>' for problem in run.problems),
        section("Verdict", lambda: verdict_section(run)),
        section("k-NN accuracy", lambda: _accuracies(run)),
        section("Evaluations", lambda: evaluations_section(run)),
        section("How the training went", lambda: curves_section([run])),
        section("This run", lambda: origin_section(run)),
        section("Images that could not be used", lambda: skipped_section(run)),
        NO_IMAGES if not images else "",
        "" if backbone is None else section("Images", lambda: _images(run, backbone, frames)),
        section("While it trained", while_it_trained),
        section("All settings", lambda: _settings(run, backbone)),
    ]
    scripts = [script for frame in frames for script in frame.scripts]
    return page(f"dino: {run.name}", sections, refresh=refresh, scripts=scripts)


NO_IMAGES = (
    '<p class="soft">Nearest neighbours, views and the similarity of patches are drawn at the end '
    "of the run. To draw them now: dino report RUN</p>"
)


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


# ---------------------------------------------------------------------------------- images
def _images(run: Run, backbone: Backbone, frames: list[Frame]) -> str:
    """The sections that need the network and the data; `frames` gets the pages inside."""
    data, val = run.about.get("data"), run.about.get("val")
    if not isinstance(data, str):
        return ""
    networks = {"trained": backbone, "untrained": untrained_like(backbone)}
    photos, origin = photographs(data, val, backbone.preprocessing.pixels)

    def similar() -> str:
        frames.append(similarity(backbone, photos))
        return frames[-1].section

    return (
        section("Nearest neighbours", lambda: neighbours(networks, data, val))
        + section("Attention", lambda: attention(networks, photos, origin))
        + section("Components of the patch features", lambda: component_maps(networks, photos))
        + section("Similar patches", similar)
        + section("Views", lambda: views_section(run, backbone.preprocessing.pixels))
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


# ---------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Write the page of a run again, or one that compares several: numbers, curves and images."""

    renamed: ClassVar[dict[str, str]] = {"run": "weights"}

    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN")]
    """The run folder, or several (at most 6) to compare."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page (.html); by default RUN/report.html. Needed for several runs."""
    watch: bool = False
    """Write the page anew whenever there is something new, until the runs end."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ReportSettings) -> Path:
    """`dino report`: write the page and print its path."""
    settings = validated(settings)
    folders, out = [Path(folder) for folder in settings.weights], settings.out
    if out is not None:
        check_output(out, (".html", ".htm"))
    path = report_path(folders, out)

    def light() -> Path:
        return report(folders, out=out, images=False, refresh=WATCHED)

    if not settings.watch or watch(folders, light):
        path = report(folders, out=out, device=pick_device(settings.device))
    print(path)
    return path
