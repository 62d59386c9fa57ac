"""The contents of a run folder, read tolerantly: what is damaged becomes a sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from dino.files import UserError, read_json
from dino.show.report.curves import Curve

NETWORKS = {
    "trained": "the trained network",
    "untrained": "the untrained network",
    "pixels": "raw pixels",
}
"""The rows of the k-NN accuracies."""

ORIGIN = {"networks", "weights", "preprocessing", "settings", "versions", "device"}
"""Keys of a result that say where it comes from."""

OTHERS = {"config.json", "results.json", "sessions.json"}
"""Files of the run folder that hold no later evaluation."""


class Evaluation(NamedTuple):
    """The result of `dino evaluate` in the run folder.

    Attributes:
        name: of the file, below the run folder.
        written: when, as date and time.
        content: of the file.
    """

    name: str
    written: str
    content: dict[str, Any]


class Run:
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        about: recipe and data of the run.
        settings: every setting that defines it, by its name on the command line.
        total: steps of the complete run, 0 if unknown.
        sessions: of each process that trained, oldest first: its command, machine, times.
        metrics: lines of `metrics.jsonl`, each with a finite "step"; k-NN as "knn k20".
        knn: k, bank and queries of the k-NN accuracies.
        scores: those of `NETWORKS` that are numbers, in percent.
        evaluations: results that were measured later, the earliest first.
        problems: sentences about files that could not be read.

    Raises:
        UserError: if it has no readable `config.json`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not _exists(self.folder / "config.json"):
            raise UserError(f"{folder} holds no config.json: give the folder of a run")
        config = _dict(read_json(self.folder / "config.json"))
        self.about, self.settings = _dict(config.get("about")), _dict(config.get("defining"))
        total = config.get("total_steps")
        self.total = total if isinstance(total, int) else 0
        self.metrics: list[dict[str, Any]] = []
        self.problems: list[str] = []
        try:
            if _exists(self.folder / "metrics.jsonl"):
                self._read_metrics(self.folder / "metrics.jsonl")
        except (UserError, OSError) as error:
            self.problems.append(str(error))
        self.knn = _dict(_dict(self._json("results.json")).get("knn"))
        self.scores = {key: self.knn[key] for key in NETWORKS if finite(self.knn.get(key))}
        sessions = self._json("sessions.json")
        self.sessions = [_dict(entry) for entry in sessions] if isinstance(sessions, list) else []
        self.evaluations = sorted(self._evaluations(), key=lambda found: found.written)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def done(self) -> int:
        """Steps done, as far as they are logged."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return 0 < self.total <= self.done

    def _json(self, name: str) -> Any:
        """The content of a file of the run folder; None if there is none that can be read."""
        try:
            path = self.folder / name
            return read_json(path) if _exists(path) else None
        except (UserError, OSError) as error:
            self.problems.append(str(error))
            return None

    def _read_metrics(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be incomplete
        for line in lines:
            try:
                entry = _dict(json.loads(line))
            except (ValueError, RecursionError):
                continue
            if finite(entry.get("step")):
                knn = _dict(entry.get("knn")).items()
                self.metrics.append({**entry, **{f"knn {key}": value for key, value in knn}})
        if ignored := len(lines) - len(self.metrics):
            self.problems.append(f"{ignored} lines of {path.name} are no metrics and were ignored")

    def _evaluations(self) -> Iterator[Evaluation]:
        """Of RUN/results/*.json, and of RUN/*.json, where older versions wrote them."""
        paths = sorted(self.folder.glob("*.json")) + sorted(self.folder.glob("results/*.json"))
        for path in paths:
            name = str(path.relative_to(self.folder))
            content = None if name in OTHERS else _dict(self._json(name))
            if not content or (path.parent == self.folder and not ORIGIN & content.keys()):
                continue
            changed = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
            yield Evaluation(name, str(content.get("written") or changed), content)

    def curve(self, name: str) -> Curve | None:
        """A measure over the steps, None if it was never measured."""
        points = [(line["step"], line[name]) for line in self.metrics if finite(line.get(name))]
        return Curve(name, *zip(*points, strict=True)) if points else None

    def knn_curve(self) -> Curve | None:
        """The k-NN accuracy of the largest k, None if it was never measured."""
        names = {re.fullmatch(r"knn k(\d+)", name) for line in self.metrics for name in line}
        ks = [int(match[1]) for match in names if match]
        return self.curve(f"knn k{max(ks)}") if ks else None


def _exists(path: Path) -> bool:
    """Whether there is such a file; a folder, or a pipe, which may never end, is an error."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file")
    return path.exists()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
