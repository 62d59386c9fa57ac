"""Schedules as pure functions of the step (paper section 3.2; published code utils.py:187-198).

Nothing is stored: a resumed run computes the same value for the same step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from dino.files import UserError
from dino.settings import validated

TeacherKind = Literal["momentum", "previous_iteration", "previous_epoch", "student_copy"]
"""The teachers of section 5.2 and Fig. 6."""


def cosine(step: float, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Linear warm-up from 0 to `base`, then half a cosine towards `final`.

    As in the published code the warm-up includes its end point (step 0 has exactly 0, and `base`
    occurs twice), and `final` is not reached: step `total` would have it.

    Args:
        step: 0-based, below `total`.
        base: value after the warm-up.
        final: value at the end.
        total: steps of the schedule, including the warm-up.
        warmup: steps of the warm-up.
    """
    if step < warmup:
        return base * step / (warmup - 1) if warmup > 1 else 0.0
    progress = (step - warmup) / (total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def ramp(index: int, start: float, end: float, count: int) -> float:
    """`count` evenly spaced values from `start` to `end` inclusive, then `end`."""
    if index >= count:
        return end
    return start + (end - start) * index / (count - 1) if count > 1 else start


@dataclass(frozen=True)
class Schedules:
    """Every scheduled value of a run, resolved to steps.

    Attributes:
        total: steps of the run.
        steps_per_epoch: steps of one pass over the images.
        warmup: steps of the learning rate's warm-up.
        lr: peak learning rate, already scaled with the batch; `lr_end` is used as it is.
        weight_decay: from, and `weight_decay_end`: to, by a cosine.
        momentum: lambda of the teacher, from, and `momentum_end`: to, by a cosine.
        temperature_start: tau_t of the first epoch, `temperature`: after the warm-up.
        temperature_epochs: epochs of its warm-up; it changes once an epoch.
        token_dropout: share of the patches that the student's global views lack, from; to 0 at
            three quarters of the run, linearly.
        freeze_steps: steps in which the last layer is frozen.
        backbone_freeze_steps: steps in which only a new head is trained.
        teacher: its kind, see `distillation.teacher`.
        end: number of steps after which the run ends, if that is not `total`: the schedules are
            then compressed or stretched, from the step `anchor[0]`, whose position is `anchor[1]`.
    """

    total: int
    steps_per_epoch: int
    warmup: int
    lr: float
    lr_end: float
    weight_decay: float
    weight_decay_end: float
    momentum: float
    momentum_end: float
    temperature_start: float
    temperature: float
    temperature_epochs: int
    freeze_steps: int
    backbone_freeze_steps: int = 0
    token_dropout: float = 0.0
    teacher: TeacherKind = "momentum"
    end: int | None = None
    anchor: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        """Reject NaN and infinity, which no check of a step's loss and gradients would detect."""
        validated(self)

    def ending(self, end: int, step: int) -> Schedules:
        """The same schedules up to `step`, continued so that they end after `end` steps."""
        return replace(self, end=end, anchor=(step, self.position(step)))

    def position(self, step: int) -> float:
        """Where the schedules are at a step, from 0 to `total`."""
        if self.end is None:
            return step
        since, position = self.anchor
        return position + (step - since) * (self.total - position) / (self.end - since)

    def lr_at(self, step: int) -> float:
        """Learning rate of all parameter groups."""
        return cosine(self.position(step), self.lr, self.lr_end, self.total, self.warmup)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of the decayed group."""
        position = self.position(step)
        return cosine(position, self.weight_decay, self.weight_decay_end, self.total)

    def momentum_at(self, step: int) -> float:
        """EMA momentum lambda of the teacher; 0 where it becomes the student, 1 where it stays."""
        if self.teacher == "previous_epoch":
            return float((step + 1) % self.steps_per_epoch != 0)
        if self.teacher != "momentum":
            return 0.0
        return cosine(self.position(step), self.momentum, self.momentum_end, self.total)

    def token_dropout_at(self, step: int) -> float:
        """Share of the patches that the student's global views lack."""
        return self.token_dropout * max(0.0, 1 - self.position(step) / (0.75 * self.total))

    def temperature_at(self, step: int) -> float:
        """Teacher temperature tau_t, constant within an epoch."""
        epoch = int(self.position(step)) // self.steps_per_epoch
        return ramp(epoch, self.temperature_start, self.temperature, self.temperature_epochs)


def in_seconds(duration: str) -> float | None:
    """A duration such as "2 hours" or "90 minutes" in seconds; None for one in other units."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(hour|minute)s?\s*", duration)
    return None if found is None else float(found[1]) * (3600 if found[2] == "hour" else 60)


def in_steps(duration: str, steps_per_epoch: int, total: int | None = None) -> int:
    """A duration such as "100 epochs", "5000 steps" or "10%" in steps, rounded.

    "%" is relative to `total`, the steps of the run; None does not allow it.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(steps?|epochs?|%|percent)\s*", duration)
    if not found or (found[2] in ("%", "percent") and total is None):
        units = "epochs or steps" if total is None else "epochs, steps or %"
        raise UserError(f"{duration!r} is not a duration: give a number of {units}")
    number, unit = float(found[1]), found[2]
    if unit.startswith("step"):
        return round(number)
    return round(number * (steps_per_epoch if unit.startswith("epoch") else (total or 0) / 100))
