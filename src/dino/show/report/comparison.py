"""Several runs on one page: what differs, their curves and results, the same images side by side.

A run is called by a letter, which its curves and pictures have too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from dino.files import UserError
from dino.models.backbone import Backbone
from dino.show.html import page, section
from dino.show.report.curves import letter, run_head, run_lines
from dino.show.report.evaluations import results_table
from dino.show.report.neighbours import neighbours
from dino.show.report.origin import date, spent
from dino.show.report.patch_maps import attention, component_maps
from dino.show.report.photographs import photographs
from dino.show.report.run_contents import Run
from dino.show.report.training_curves import curves_section
from dino.show.report.verdict import judge


def comparison(
    runs: Sequence[Run], backbones: Sequence[Backbone | None], refresh: int | None = None
) -> str:
    """The page of several runs.

    Args:
        runs: two or more, at most `html.RUNS`.
        backbones: of each run; None where it cannot be read or no pictures are wanted.
        refresh: seconds after which a browser loads the page again.
    """
    names = [run.name for run in runs]
    written = f"page of {date(datetime.now().astimezone().isoformat())}"
    sections = [
        f'<h1>{len(runs)} runs compared</h1><p class="soft">{escape(written)}</p>',
        section("Runs", lambda: _runs(runs)),
        section("Settings that differ", lambda: _settings(runs)),
        section("Results", lambda: results_table(runs)),
        section("How the training went", lambda: curves_section(runs)),
        section("Images", lambda: _images(runs, backbones)),
    ]
    return page(f"dino: {', '.join(names)}", sections, refresh=refresh, wide=True)


def _runs(runs: Sequence[Run]) -> str:
    """What each run is, how far it is and how it went."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        verdict = judge(run)
        speed = run.curve("images_per_s")
        facts = {
            "run": run.name,
            "verdict": "" if verdict is None else verdict.words,
            "steps": f"{run.done:,} of {run.total:,}" if run.total else f"{run.done:,}",
            "duration": spent(run),
            "images per second": "" if speed is None else f"{speed.values[-1]:.3g}",
            "folder": str(run.folder.resolve()),
        }
        for name, fact in facts.items():
            rows.setdefault(name, []).append(fact)
    table = f"<table>{run_head(len(runs), '')}{run_lines(rows)}</table>"
    problems = "".join(
        f'<p class="warn">{letter(number)}: {escape(problem)}.</p>'
        for number, run in enumerate(runs)
        for problem in run.problems
    )
    return f'{problems}<div class="card">{table}</div>'


def _settings(runs: Sequence[Run]) -> str:
    """The settings of which the runs have different values."""
    values = [{**run.about, **run.settings} for run in runs]
    names = list(dict.fromkeys(name for of in values for name in of))
    rows: dict[str, list[str]] = {}
    for name in names:
        texts = [_text(of[name]) if name in of else "not set" for of in values]
        if len({*texts}) > 1:
            rows[name] = texts
    equal = f"{len(names) - len(rows):,} other settings are equal."
    if not rows:
        return f"<h2>Settings that differ</h2><p>None. {equal}</p>"
    table = f"<table>{run_head(len(runs), 'setting')}{run_lines(rows)}</table>"
    return (
        f'<h2>Settings that differ</h2><div class="card">{table}</div><p class="soft">{equal}</p>'
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------------------------- images
NO_IMAGES = (
    '<p class="soft">Neighbours, attention and components are drawn when the runs have ended and '
    "their weights can be read.</p>"
)


def _images(runs: Sequence[Run], backbones: Sequence[Backbone | None]) -> str:
    """Neighbours, attention and components of the test images of the first run that has some."""
    found = {
        f"{letter(number)}: {run.name}": (run, backbone)
        for number, (run, backbone) in enumerate(zip(runs, backbones, strict=True))
        if backbone is not None
    }
    if not found:
        return NO_IMAGES
    source = next(
        (run for run, _ in found.values() if isinstance(run.about.get("data"), str)), None
    )
    if source is None:
        raise UserError("no run names the images that it was trained on")
    data, val = source.about["data"], source.about.get("val")
    pixels = next(
        backbone.preprocessing.pixels for run, backbone in found.values() if run is source
    )
    networks = {
        name: backbone
        for name, (_, backbone) in found.items()
        if backbone.preprocessing.pixels == pixels
    }
    photos, origin = photographs(data, val, pixels)
    said = [f"Pictures below are of {data if val is None else val}, the test images of "]
    said[0] += f"{letter(runs.index(source))}."
    if others := [name for name in found if name not in networks]:
        said.append(f"{' and '.join(others)} take images of other channels and are left out.")
    if any(run.about.get("data") != data for run in runs):
        said.append("Not all runs were trained on the same images.")
    if unread := [letter(n) for n, backbone in enumerate(backbones) if backbone is None]:
        said.append(f"{' and '.join(unread)} have no weights that can be read.")
    return (
        f'<p class="soft">{escape(" ".join(said))}</p>'
        + section("Nearest neighbours", lambda: neighbours(networks, data, val))
        + section("Attention", lambda: attention(networks, photos, origin, details=False))
        + section("Components of the patch features", lambda: component_maps(networks, photos))
    )
