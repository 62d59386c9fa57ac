"""What a run tells: sentences on the terminal, lines of `metrics.jsonl`, lists in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dino.data.views.view_spec import COLOUR_ONLY
from dino.distillation.step import Distillation
from dino.runtime import Ranks
from dino.train.config import PretrainConfig
from dino.train.metrics_log import Record
from dino.train.skipped_images import Skipped


class Telling:
    """The voice of a run: only the main rank speaks, and all ranks list what they refused.

    Args:
        run: the run folder.
        config: all settings.
        ranks: which process this is.
        total: steps of the run.
        start: steps already done.
    """

    def __init__(
        self, run: Path, config: PretrainConfig, ranks: Ranks, total: int, start: int
    ) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.total, self.start = total, start
        board = config.execution.tensorboard
        self._record = Record(run, total, start, tensorboard=board) if ranks.main else None
        self._skipped = 0

    def __enter__(self) -> Telling:
        if self._record is not None:
            self._record.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._record is not None:
            self._record.__exit__(*error)

    def say(self, text: str, style: str = "") -> None:
        """A sentence for the user."""
        if self._record is not None:
            self._record.say(text, style)

    def write(self, line: dict[str, Any]) -> None:
        """A line of metrics; `line["step"]` counts the steps done."""
        if self._record is not None:
            self._record.write(line)

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self._record is not None:
            self._record.advance(step)

    def greet(
        self, distillation: Distillation, images: int, device: torch.device, doubts: Sequence[str]
    ) -> None:
        """What is about to be trained on what, and the doubts about it."""
        backbone, head = (
            sum(parameter.numel() for parameter in part.parameters()) / 1e6
            for part in (distillation.student.backbone, distillation.student.head)
        )
        how = f"resuming at step {self.start}" if self.start else "starting"
        self.say(
            f"{how}: {images:,} images, {self.total:,} steps of {self.config.run.batch} images, "
            f"{backbone:.1f} M + {head:.1f} M parameters (backbone + head), "
            f"{device} x {self.ranks.world}, {self.run}"
        )
        if (channels := self.config.pixels.channels) != 3:
            self.say(f"{channels} channels: without {', '.join(COLOUR_ONLY)}, which are for RGB")
        for doubt in doubts:
            self.say(f"warning: {doubt}", "yellow")

    def measured(self, step: int, name: str, values: dict[str, float]) -> None:
        """An evaluation of the teacher."""
        self.write({"step": step, name: values})
        words = "  ".join(f"{key} {value:.1f}" for key, value in values.items())
        when = f"step {step}" if step else "before the first step"
        self.say(f"{when}: {name} {words}", "green")

    def skipped(self, skipped: Skipped, *, last: bool = False) -> None:
        """Images that could not be used: at the first of them, and at last if there are more."""
        if len(skipped) > self._skipped and (last or not self._skipped):
            self._skipped = len(skipped)
            self.say(
                f"{len(skipped):,} images could not be used ({skipped.describe()}) and "
                f"others took their place: see {skipped.path}",
                "yellow",
            )

    def refused(self, step: int, loss: float, images: Sequence[str]) -> None:
        """A step that was not finite, and this rank's images of it."""
        path = self.run / "refused.jsonl"
        line = {"step": step, "rank": self.ranks.rank, "loss": str(loss), "images": list(images)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(
            f"step {step} refused: loss or gradients were not finite (loss {loss}); "
            f"nothing moved; its images are listed in {path}",
            "yellow",
        )
