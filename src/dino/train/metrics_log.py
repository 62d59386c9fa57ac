"""The record of a run: `metrics.jsonl`, live progress on the terminal, TensorBoard if asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from dino.files import UserError, atomic_write, finite_json

LINE_SECONDS = 30.0
"""How often a line is printed where there is no terminal to draw on."""


class Record:
    """Where everything that is measured goes, and what the user sees of it.

    Only the main rank makes one. Lines of `metrics.jsonl` are flushed as they are written.

    Args:
        run: the run folder.
        total: steps of the run.
        start: steps already done; later lines of an interrupted run are dropped, so that no step
            is told twice.
        tensorboard: also write TensorBoard events.

    Raises:
        UserError: if TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, total: int, start: int = 0, *, tensorboard: bool = False) -> None:
        self.path, self.total = run / "metrics.jsonl", total
        self.console = Console(stderr=True)
        _drop_lines_from(self.path, start if start else -1)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(run) if tensorboard else None
        self._spoke = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[measures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, measures="")
        self._started, self._first = time.monotonic(), start

    def __enter__(self) -> Record:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        self._progress.update(self._task, completed=step)

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics; `line["step"]` counts the steps done."""
        self._file.write(json.dumps(finite_json(line), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])
        if "loss" in line:
            self._speak(line)

    def say(self, text: str, style: str = "") -> None:
        """A sentence for the user, above the progress bar."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def _speak(self, line: dict[str, Any]) -> None:
        measures = (
            f"loss {line['loss']:.3f}  {line['images_per_s']:.0f} images/s"
            f"  data-wait {line['data_wait']:.0%}  entropy {line['teacher_entropy']:.2f}"
            f"  KL {line['kl']:.2f}  spread {line['feature_std']:.2f}"
            f"  rank {line['effective_rank']:.0f}"
        )
        self._progress.update(self._task, measures=measures, completed=line["step"])
        now, last = time.monotonic(), line["step"] >= self.total
        if not self.console.is_terminal and (last or now - self._spoke >= LINE_SECONDS):
            done = line["step"] - self._first
            left = (now - self._started) / max(done, 1) * (self.total - line["step"])
            self.say(f"step {line['step']}/{self.total}  {measures}  left {_clock(left)}")
            self._spoke = now


@dataclass
class Window:
    """Sums since the last line of metrics."""

    losses: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: float, entropy: float, images: int) -> None:
        """One step's measures, of so many images."""
        self.losses.append(loss)
        self.entropies.append(entropy)
        self.images += images

    def skip(self, seconds: float) -> None:
        """Leave time that is not training out of the rates."""
        self.since += seconds

    def close(self) -> dict[str, float]:
        """Means and rates, and start anew."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        count = max(1, len(self.losses))
        loss, entropy = sum(self.losses) / count, sum(self.entropies) / count
        measures = {
            "loss": loss,
            "teacher_entropy": entropy,
            "kl": loss - entropy,
            "images_per_s": self.images / elapsed,
            "data_wait": min(1.0, self.waited / elapsed),
        }
        self.losses, self.entropies, self.images, self.waited = [], [], 0, 0.0
        self.since = time.perf_counter()
        return measures


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's `metrics.jsonl`, in order; a line cut by a crash is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    return [line for line in map(_parse, path.read_text(encoding="utf-8").splitlines()) if line]


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line


def _drop_lines_from(path: Path, start: int) -> None:
    """Drop the lines of later steps; -1 drops all, those before the first step too."""
    lines = [line for line in read_metrics(path.parent) if line["step"] <= start]
    if path.exists():
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


def _scalars(line: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install dino-ssl[tensorboard]") from None
    return SummaryWriter(str(run / "tensorboard"))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
