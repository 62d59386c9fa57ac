"""What was measured on a run after its training, by `dino evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from dino.show.html import figure, table
from dino.show.report.origin import date
from dino.show.report.run_contents import ORIGIN, Evaluation, Run, finite

NUMBERS = 60
"""At most so many numbers are shown of a result without scores."""


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
    name = " on ".join(str(content[key]) for key in ("evaluation", "data") if key in content)
    title = f"<h3><span>{escape(name or found.name)}</span></h3>"
    return figure(title + table(rows, head), ", ".join(facts) + ".", "card")


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
