"""`sessions.json`: when, where and by which command a run was trained.

One entry for each process that trained, since a run that was stopped is resumed by another: maybe
on another machine, with another version.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from dino.files import UserError, atomic_json, read_json


class Session:
    """This process's entry, which `save` writes.

    Args:
        run: the run folder.
        origin: the command, machine, versions and changed settings, as JSON takes them.
    """

    def __init__(self, run: str | Path, origin: dict[str, Any]) -> None:
        self.path = Path(run) / "sessions.json"
        self.origin, self._started, self._since = origin, _now(), time.monotonic()
        self._earlier: list[Any] | None = None

    def save(self, step: int) -> None:
        """Write the entry after `step` steps, behind those of earlier processes."""
        if self._earlier is None:
            self._earlier = _entries(self.path)
        seconds = round(time.monotonic() - self._since, 1)
        times = {"started": self._started, "saved": _now(), "seconds": seconds, "step": step}
        atomic_json(self.path, [*self._earlier, {**times, **self.origin}])


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _entries(path: Path) -> list[Any]:
    """What the file holds; nothing where it is missing or damaged, which fails no run."""
    try:
        content = read_json(path)
    except UserError:
        return []
    return content if isinstance(content, list) else []
