"""What was measured on a run after its training, by `dino evaluate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from dino.show.html import figure, table
from dino.show.report.curves import run_head, run_lines
from dino.show.report.origin import date
from dino.show.report.run_contents import NETWORKS, ORIGIN, Evaluation, Run, finite

NUMBERS, ROWS = 60, 200
"""At most so many numbers are shown of a result without scores, and rows of several runs."""


def evaluations_section(run: Run) -> str:
    """A table for each result in the run folder; empty without any."""
    tables = "".join(map(_evaluation, run.evaluations))
    return f'<h2>Evaluations</h2><div class="grid">{tables}</div>' if tables else ""


def _evaluation(found: Evaluation) -> str:
    content = found.content
    facts = [found.name, f"written {date(found.written)}"]
    if finite(images := content.get("measured_images")):
        facts.insert(0, f"{images:,} images")
    scores, numbers = _scores(content.get("scores")), [*_numbers(content)]
    head, rows = scores if scores else (["measure", "value"], numbers[:NUMBERS])
    if not scores and len(numbers) > NUMBERS:
        facts.append(f"{len(numbers) - NUMBERS} more numbers are in the file")
    title = f"<h3><span>{escape(_title(found))}</span></h3>"
    return figure(title + table(rows, head), ", ".join(facts) + ".", "card")


# ------------------------------------------------------------------------------- several runs
def results_table(runs: Sequence[Run]) -> str:
    """All results of several runs, a column for each run; empty without any."""
    found = [_results(run) for run in runs]
    names = list(dict.fromkeys(name for results in found for name in results))
    if not names:
        return ""
    rows = {name: [results.get(name, "") for results in found] for name in names[:ROWS]}
    note = "In percent, ± one standard error: twice as much may be chance."
    if len(names) > ROWS:
        note += f" {len(names) - ROWS} more numbers are in the files of the runs."
    cells = f"<table>{run_head(len(runs), 'measure')}{run_lines(rows)}</table>"
    return f"<h2>Results</h2>{figure(cells, note, 'card')}"


def _results(run: Run) -> dict[str, str]:
    """The numbers of a run by what they measure."""
    found: dict[str, str] = {}
    if run.scores and finite(count := run.knn.get("queries")) and count >= 1:
        kind = "leave-one-out" if run.knn.get("leave_one_out") else "test images"
        for network, percent in run.scores.items():
            share = min(max(percent / 100, 0), 1)
            error = 100 * math.sqrt(share * (1 - share) / count)
            name = f"k-NN at the end, k = {run.knn.get('k')}, {count:,} {kind}: {NETWORKS[network]}"
            found[name] = _percent({"percent": percent, "standard_error": error})
    for evaluation in run.evaluations:
        for name, value in _rows(evaluation).items():
            file = f" ({evaluation.name})" if name in found else ""
            found[f"{name}{file}"] = value
    return found


def _rows(found: Evaluation) -> dict[str, str]:
    content = found.content
    title = _title(found)
    if finite(images := content.get("measured_images")):
        title += f", {images:,} images"
    scores = content.get("scores")
    if not isinstance(scores, dict) or _scores(scores) is None:
        return {f"{title}: {name}": value for name, value in _numbers(content)}
    return {
        f"{title}: {measure}, {network}": text
        for measure, of in scores.items()
        for network, score in of.items()
        if (text := _percent(score))
    }


def _title(found: Evaluation) -> str:
    content = found.content
    named = " on ".join(str(content[key]) for key in ("evaluation", "data") if key in content)
    return named or found.name


def _scores(scores: Any) -> tuple[list[str], list[list[str]]] | None:
    """Networks as columns and measures as rows, in percent; None for a result without scores.

    `scores` is {measure: {network: {"percent": ..., "standard_error": ...}}}.
    """
    if not isinstance(scores, dict) or not all(isinstance(of, dict) for of in scores.values()):
        return None
    networks = list(dict.fromkeys(network for of in scores.values() for network in of))
    rows = [[name, *(_percent(of.get(net)) for net in networks)] for name, of in scores.items()]
    return (["%", *networks], rows) if rows else None


def _percent(score: Any) -> str:
    values = score if isinstance(score, dict) else {"percent": score}
    percent, error = values.get("percent"), values.get("standard_error")
    if not finite(percent):
        return ""
    return f"{percent:.1f} ± {error:.1f}" if finite(error) else f"{percent:.1f}"


def _numbers(content: dict[str, Any], above: str = "") -> Iterator[Sequence[str]]:
    """The numbers among the values of nested dictionaries, by the keys that lead to them."""
    for key, value in content.items():
        name = f"{above} {key}".strip()
        if isinstance(value, dict) and key not in ORIGIN:
            yield from _numbers(value, name)
        elif finite(value):
            yield name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
