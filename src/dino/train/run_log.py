"""The log of a run: sentences and a progress bar on the terminal, `metrics.jsonl`, other sinks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress
from rich.table import Column

from dino.files import atomic_write, finite_json
from dino.progress import Console, PlainTextColumn
from dino.runtime import Ranks
from dino.train.sinks import Sinks
from dino.train.skipped_images import SkippedImages

LINE_SECONDS = 30.0
"""How often a line is printed where no progress bar can be drawn."""


class RunLog:
    """What a run prints, and its lines of metrics.

    Only the main rank prints and writes metrics; every rank lists the steps that it refused. Lines
    of `metrics.jsonl` are flushed as they are written.

    Args:
        run: the run folder.
        ranks: which process this is.
        total: steps of the run.
        start: steps already done; later lines of an interrupted run are dropped, so that no step
            is logged twice.
        sinks: of `train.sinks`, which get the same numbers.
        settings: of the run, for these.

    Raises:
        UserError: if a sink cannot be opened.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        total: int,
        start: int = 0,
        *,
        sinks: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.ranks, self.total, self.start = run, ranks, total, start
        self.console = Console(stderr=True, quiet=not ranks.main)
        self._sinks = Sinks(sinks if ranks.main else (), run, settings or {}, self.say)
        self._file = None
        if ranks.main:
            if unreadable := _drop_lines_from(run / "metrics.jsonl", start if start else -1):
                self.say(f"{run / 'metrics.jsonl'}: left out {unreadable} unreadable lines")
            self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._skipped, self._lines, self._printed, self._expected = 0, 0, 0.0, 0.0
        self._progress = Progress(
            PlainTextColumn("task.fields[step]"),
            BarColumn(bar_width=16),
            PlainTextColumn("task.fields[left]"),
            PlainTextColumn(
                "task.fields[measures]",
                style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=self.console,
            expand=True,
            disable=not (ranks.main and self.console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, step="", left="", measures="")
        self._started = time.monotonic()

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._sinks.close()
        if self._file is not None:
            self._file.close()

    def say(self, text: str, style: str = "") -> None:
        """Print a sentence above the progress bar."""
        self.console.print(text, style=style, soft_wrap=True)

    def advance(self, step: float) -> None:
        """Show that `step` steps are done, of which the last may be done in part."""
        left = self._left(step)
        text = f"step {int(step)}/{self.total}"
        self._progress.update(self._task, completed=step, total=self.total, step=text, left=left)
        if not self.console.is_terminal and time.monotonic() - self._printed >= LINE_SECONDS:
            share = f" and {step % 1:.0%} of the next" if step % 1 else ""
            self.say(f"{text}{share}  {left}")
            self._printed = time.monotonic()

    def _left(self, step: float) -> str:
        """The time to the end, at first as it was estimated."""
        elapsed, done = time.monotonic() - self._started, step - self.start
        seconds = self._expected
        if done > 0 and (elapsed > LINE_SECONDS or not seconds):
            seconds = elapsed / done
        return f"left {timedelta(seconds=round(seconds * (self.total - step)))}"

    def begin(self, lines: Sequence[str], step_seconds: float) -> None:
        """Print the introduction, and count the time from now; a step is expected to take that."""
        for line in lines:
            self.say(line, "yellow" if line.startswith("warning") else "")
        self._expected = step_seconds
        self._started = self._printed = time.monotonic()
        self.advance(self.start)

    def skipped(self, skipped: SkippedImages, *, last: bool = False) -> None:
        """Images that could not be used: at the first of them, and at last if there are more."""
        if len(skipped) > self._skipped and (last or not self._skipped):
            self._skipped = len(skipped)
            self.say(
                f"{len(skipped):,} images could not be used ({skipped.describe()}) and "
                f"others took their place: see {skipped.path}",
                "yellow",
            )

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics; `line["step"]` counts the steps done."""
        if self._file is None:
            return
        self._file.write(json.dumps(finite_json(line), allow_nan=False) + "\n")
        self._file.flush()
        values = {
            n: v for n, v in flat(line).items() if isinstance(v, (int, float)) and n != "step"
        }
        self._sinks.write(line["step"], values)
        if "loss" in line:
            self._show(line)

    def evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """An evaluation of the teacher after `step` steps."""
        self.write({"step": step, name: values})
        numbers = "  ".join(f"{key} {value:.1f}" for key, value in values.items())
        when = f"step {step}" if step else "before the first step"
        self.say(f"{when}: {name} {numbers}", "green")

    def refused(self, step: int, loss: float, images: Sequence[str]) -> None:
        """A step that was not finite, and this rank's images of it."""
        path = self.run / "refused.jsonl"
        line = {"step": step, "rank": self.ranks.rank, "loss": str(loss), "images": list(images)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(
            f"step {step} refused: loss or gradients were not finite (loss {loss}); "
            f"no weight was changed; its images are listed in {path}",
            "yellow",
        )

    def _show(self, line: dict[str, Any]) -> None:
        if "kl" in line:
            targets = f"entropy {line['teacher_entropy']:.2f}  KL {line['kl']:.2f}"
        else:
            targets = f"targets {line['target_spread']:.3f}"
        measures = (
            f"loss {line['loss']:.3f}  {line['images_per_s']:.0f} images/s"
            f"  data-wait {line['data_wait']:.0%}  {targets}  spread {line['feature_std']:.2f}"
            f"  rank {line['effective_rank']:.0f}"
        )
        self._progress.update(self._task, measures=measures)
        now, step = time.monotonic(), line["step"]
        if not self.console.is_terminal and (
            step >= self.total or not self._lines or now - self._printed >= LINE_SECONDS
        ):
            self.say(f"step {step}/{self.total}  {self._left(step)}  {measures}")
            self._printed, self._lines = now, self._lines + 1


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics with the values of dictionaries under names such as `knn/k20`."""
    result: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            result |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            result[name] = value
    return result


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without unreadable ones, as a killed process leaves them."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [line for line in map(_parse, lines) if line is not None]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _drop_lines_from(path: Path, start: int) -> int:
    """Drop the lines of later steps (-1: all) and unreadable ones; returns how many those are."""
    if not path.exists():
        return 0
    lines = read_metrics(path.parent)
    unreadable = len(path.read_bytes().splitlines()) - len(lines)
    earlier = (line for line in lines if line["step"] <= start)
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in earlier))
    return unreadable
