"""Where a run comes from and how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from dino.show.html import table
from dino.show.report.run_contents import Run, finite


def origin_section(run: Run) -> str:
    """Command, times, machine, versions and changed settings; empty where none are recorded."""
    if not run.sessions:
        return ""
    facts = table([*_facts(run)], css="facts")
    return f'<h2>This run</h2><div class="card">{facts}</div>'


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    first, last = run.sessions[0], run.sessions[-1]
    yield "started", date(first.get("started"))
    yield "newest checkpoint" if not run.finished else "finished", date(last.get("saved"))
    yield "duration", spent(run)
    if left := _left(run):
        yield "time left", f"about {left}"
    for key in ("command", "machine"):
        found = dict.fromkeys(str(entry[key]) for entry in run.sessions if key in entry)
        yield key, "\n".join(found)
    versions = last.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    changed = last.get("changed")
    if isinstance(changed, dict):
        against = f"against recipe {run.about.get('recipe')}"
        yield f"changed settings, {against}", "\n".join(_changes(changed)) or "none"
    yield "folder", str(run.folder.resolve())


def spent(run: Run) -> str:
    """How long a run has trained, as far as it is recorded."""
    if not run.sessions:
        return ""
    seconds = [entry["seconds"] for entry in run.sessions if finite(entry.get("seconds"))]
    times = f", {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""
    return f"{timedelta(seconds=round(sum(seconds)))}{times}"


def _changes(changed: dict[str, Any]) -> Iterator[str]:
    """One line for each changed setting."""
    for name, pair in changed.items():
        before, now = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
        yield f"{name} = {json.dumps(now)} (recipe: {json.dumps(before)})"


def date(text: Any) -> str:
    """A date and time in ISO 8601 without seconds, "unknown" for anything else."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return "unknown"


def _left(run: Run) -> timedelta | None:
    """The time that the rest of the run takes at its newest speed, without evaluations."""
    speed, batch = run.curve("images_per_s"), run.settings.get("run.batch")
    if run.finished or run.total == 0 or speed is None or not finite(batch):
        return None
    return timedelta(seconds=round((run.total - run.done) * batch / max(speed.values[-1], 1e-9)))
