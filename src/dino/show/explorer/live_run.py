"""A run while it trains, for the page: its curves and its newest teacher.

Only what `metrics.jsonl` has grown by is read, so that watching costs a run next to nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dino.files import UserError, read_json
from dino.models.backbone import Backbone
from dino.show.report.curves import Curve, chart
from dino.show.report.run_contents import finite
from dino.weights.load import load

TITLES = {
    "knn": "k-NN accuracy, %",
    "loss": "Loss",
    "teacher_entropy": "Teacher entropy",
    "kl": "KL divergence",
    "feature_std": "Spread of the features",
    "effective_rank": "Effective rank",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
}
"""The measures that are drawn, in this order."""


class LiveRun:
    """The folder of a run that may be training.

    Args:
        folder: of the run; `metrics.jsonl` and the teacher may appear later.

    Raises:
        UserError: if it holds no `config.json`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"--run {folder} holds no config.json: give the folder of a run")
        config = read_json(self.folder / "config.json")
        total = config.get("total_steps") if isinstance(config, dict) else None
        self.total = total if isinstance(total, int) else 0
        self._forget()

    def _forget(self) -> None:
        self._read, self._rest = 0, b""
        self._points: dict[str, tuple[list[float], list[float]]] = {}
        self.step = 0

    def update(self) -> None:
        """Read the lines that were written since the last call."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            if file.seek(0, 2) < self._read:  # a resumed run has dropped its last lines
                self._forget()
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                self._add(json.loads(line))
            except (ValueError, RecursionError):
                continue

    def _add(self, entry: Any) -> None:
        if not isinstance(entry, dict) or not finite(step := entry.get("step")):
            return
        self.step = max(self.step, int(step))
        knn = entry.get("knn")
        values = {**entry, "knn": _of_largest_k(knn) if isinstance(knn, dict) else None}
        for name in TITLES:
            if finite(value := values.get(name)):
                steps, found = self._points.setdefault(name, ([], []))
                steps.append(step)
                found.append(value)

    def state(self) -> dict[str, Any]:
        """Steps done and in all, the newest teacher's version, and a chart (SVG) a measure."""
        self.update()
        charts = [
            {"title": title, "value": f"{found[1][-1]:.4g}", "svg": chart([Curve(title, *found)])}
            for name, title in TITLES.items()
            if (found := self._points.get(name))
        ]
        return {
            "step": self.step,
            "total": self.total,
            "teacher": self.teacher(),
            "charts": charts,
        }

    def teacher(self) -> str | None:
        """What changes whenever the run writes a teacher; None before the first."""
        try:
            status = (self.folder / "teacher.safetensors").stat()
        except OSError:
            return None
        return f"{status.st_mtime_ns}-{status.st_size}"

    def load_teacher(self, device: Any) -> Backbone:
        """The newest teacher.

        Raises:
            UserError: if there is none yet.
        """
        if self.teacher() is None:
            raise UserError(f"{self.folder} has no teacher yet: wait for its first checkpoint")
        return load(self.folder / "teacher.safetensors", device)


def _of_largest_k(knn: dict[str, Any]) -> Any:
    ks = [int(found[1]) for name in knn if (found := re.fullmatch(r"k(\d+)", name))]
    return knn[f"k{max(ks)}"] if ks else None
