"""A run for a given time: which network, at how many pixels, with which settings.

Networks of growing cost are timed on this machine with the user's images. The choice is the
largest that processes enough images in the time to be better than the one before (`RUNGS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import Source
from dino.distillation.schedules import in_seconds
from dino.files import UserError
from dino.runtime import Ranks, default_workers, gather_objects
from dino.settings import validated
from dino.train.build import build, check_memory, float_views
from dino.train.config import PretrainConfig
from dino.train.planning.estimate import estimate
from dino.train.planning.time_budget import UNKNOWN
from dino.train.recipes import laptop
from dino.train.run_folder import read_config
from dino.weights.checkpoint import last_step


class Rung(NamedTuple):
    """A network of the ladder.

    Attributes:
        settings: what differs from the recipe `laptop`.
        images: processed images from which on it is better than the rung before.
    """

    settings: dict[str, Any]
    images: float


RUNGS = (
    Rung({}, 0),
    Rung({"views.global_size": 96, "views.local_size": 48}, 6e5),
    Rung({"views.global_size": 128, "views.local_size": 64}, 1.5e6),
    Rung({"model.arch": "resnet18", "views.global_size": 128, "views.local_size": 64}, 4e6),
)
ALWAYS_TIMED = 3
"""Rungs of the table; larger ones only where the one before processes enough images."""
DEFAULT = "1 hour"
"""The budget of a run without a recipe."""
MOST_EPOCHS = 800
"""Longer runs than the published ones are not planned."""
STEPS = 20_000
"""With fewer the batch is the smallest."""
SMALLEST_BATCH, LARGEST_BATCH = 32, 256
"""GPUs, which are not busy with the smallest, take the largest."""
SAVE_SECONDS = 300
"""About how often a run is saved."""
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class Budget(NamedTuple):
    """A time in seconds, and whether it is added to that of a finished run."""

    seconds: float
    more: bool = False

    @property
    def duration(self) -> str:
        """As `run.duration` has it."""
        hours = self.seconds / 3600
        return f"{hours:g} hours" if hours >= 1 else f"{self.seconds / 60:g} minutes"


def resumed(run: str | Path, budget: Budget | None) -> tuple[PretrainConfig, str] | None:
    """The configuration of the run in a folder, and its recipe; None if it holds no checkpoint.

    With `budget` its duration is that time, unless it is a number of epochs or steps.

    Raises:
        UserError: as `duration` does.
    """
    length = None if budget is None else duration(run, budget)
    stored = _stored(run)
    if stored is None:
        return None
    config = PretrainConfig()
    config = validated(config.changed({n: stored[n] for n in config.flat() if n in stored}))
    if length is not None and in_seconds(config.run.duration) is not None:
        config = config.changed({"run.duration": length})
    return config, str(stored["recipe"])


def duration(run: str | Path, budget: Budget) -> str:
    """The setting `run.duration` of a run with this budget, which may continue an earlier one.

    Raises:
        UserError: for more time of a run that does not exist, or was not made for a time.
    """
    stored = _stored(run)
    if not budget.more:
        return budget.duration
    if stored is None:
        raise UserError(f"{run} holds no run that could go on: give --budget without +")
    before = in_seconds(stored["run.duration"])
    if before is None:
        raise UserError(
            f"{run} holds a run of {stored['run.duration']}, whose schedules end with it: to train "
            f"on from its weights, name a recipe, --init-from {run} and another --out"
        )
    return Budget(before + budget.seconds).duration


def _stored(run: str | Path) -> dict[str, Any] | None:
    """The settings and the recipe of the run in a folder; None if it holds no checkpoint."""
    folder = Path(run)
    if last_step(folder / "checkpoints") is None:
        return None
    content = read_config(folder / "config.json")
    execution = content.get("execution", {})
    settings = {f"execution.{name}": value for name, value in execution.items()}
    recipe = content.get("about", {}).get("recipe", "own")
    if not isinstance(content["defining"].get("run.duration"), str):
        raise UserError(f"{folder / 'config.json'} names no run.duration: restore it from a copy")
    return {**content["defining"], **settings, "recipe": recipe}


def parse(text: str) -> Budget:
    """A budget from "2h", "90min", "1h30m", "1.5 hours", "3 days" or, with more time, "+2h".

    Raises:
        UserError: for anything else, and for less than ten seconds.
    """
    units = r"(d|h|m|s)(?:ays?|ours?|rs?|in(?:ute)?s?|ec(?:ond)?s?)?"
    part = rf"([0-9]{{0,9}}\.?[0-9]{{1,9}})\s*{units}\s*"
    found = re.fullmatch(rf"\s*(\+?)\s*((?:{part})+)", text.lower())
    seconds = 0.0
    if found:
        seconds = sum(float(number) * UNITS[unit] for number, unit in re.findall(part, found[2]))
    if not (found and 10 <= seconds <= 1000 * UNITS["d"]):
        raise UserError(f"--budget {text!r} is no time: give for example 2h, 90min, 1h30m or +2h")
    return Budget(seconds, bool(found[1]))


@dataclass(frozen=True)
class Candidate:
    """A network that was timed.

    Attributes:
        config: of the run.
        speed: images a second, over all processes; 0 if it does not fit.
        memory: bytes that a step takes.
        problem: why it does not fit.
    """

    config: PretrainConfig
    speed: float
    memory: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        """Network and pixels."""
        model, views = self.config.model, self.config.views
        patch = f"/{model.patch_size}" if model.patch_size else ""
        return f"{model.arch}{patch}, {views.global_size} px"


def ladder(images: int, world: int = 1, device: str = "cpu") -> list[PretrainConfig]:
    """The configurations of the ladder, from the cheapest on.

    Args:
        images: number of images.
        world: number of processes.
        device: type of their devices.
    """
    batch = SMALLEST_BATCH * max(1, world // SMALLEST_BATCH)
    while batch > images and batch > world:
        batch //= 2
    prototypes = min(65536, max(1024, 2 ** round(math.log2(max(images, 1) / 5))))
    base = laptop().changed({"run.batch": batch, "head.prototypes": prototypes})
    if device == "cuda":
        base = base.changed(_batch(base, min(images, LARGEST_BATCH)))
    return [base.changed(rung.settings) for rung in RUNGS]


def timed(
    configs: Sequence[PretrainConfig],
    source: Source,
    device: torch.device,
    ranks: Ranks,
    seconds: float,
) -> list[Candidate]:
    """The configurations with their speed on this machine, which takes some seconds each.

    Those that are never chosen in so many `seconds` are left out at the end, but for the first
    `ALWAYS_TIMED`.
    """
    found: list[Candidate] = []
    for config, rung in zip(configs, RUNGS, strict=True):
        if len(found) >= ALWAYS_TIMED and found[-1].speed * seconds < rung.images:
            break
        found += gather_objects(timed_network(config, source, device, ranks))[:1]
    return found


def timed_network(
    config: PretrainConfig, source: Source, device: torch.device, ranks: Ranks
) -> Candidate:
    """A configuration with its speed on this machine, which takes some seconds."""
    try:
        sampler = EpochSampler(
            len(source), config.run.batch, 0, ranks.rank, ranks.world, blocks=source.blocks
        )
        check_memory(config, device, ranks)
        workers = config.execution.workers
        workers = default_workers() if workers is None else workers
        schedules = config.schedules(sampler.steps_per_epoch, UNKNOWN)
        cost = estimate(
            build(config, schedules, device, ranks),
            PretrainLoader(
                source, config.views.specs(), sampler, seed=0, channels=config.pixels.channels
            ),
            partial(float_views, pixels=config.pixels, device=device),
            batch=config.run.batch // ranks.world,
            micro_batch=None,
            step=0,
            workers=workers,
        )
        return Candidate(config, config.run.batch / cost.step_seconds, cost.peak)
    except UserError as error:
        return Candidate(config, 0.0, problem=str(error))


def chosen(
    found: Sequence[Candidate], images: int, seconds: float, budget: Budget
) -> tuple[PretrainConfig, str]:
    """The configuration for a time, and a sentence that says why.

    Args:
        found: of `timed`, in the order of `RUNGS`.
        images: of the source.
        seconds: that remain of it for the training.
        budget: the entire time.

    Raises:
        UserError: if none fits into the memory.
    """
    fitting = [pair for pair in zip(found, RUNGS, strict=False) if pair[0].speed]
    if not fitting:
        raise UserError(found[0].problem)
    best, rung = fitting[0]
    for candidate, next_rung in fitting[1:]:
        if candidate.speed * seconds >= next_rung.images:
            best, rung = candidate, next_rung
    processed = best.speed * seconds
    why = f"{best.name}: {processed:,.0f} images processed"
    larger = [pair for pair in fitting if pair[1].images > rung.images]
    if larger:
        why += f"; {larger[0][0].name} needs {larger[0][1].images:,.0f} to be better"
    changes: dict[str, Any] = {"run.duration": budget.duration}
    if processed > MOST_EPOCHS * images:
        why += f"; {MOST_EPOCHS} epochs suffice"
        processed = MOST_EPOCHS * images
        changes["run.duration"] = f"{MOST_EPOCHS} epochs"
    changes |= _batch(best.config, min(images, processed / STEPS))
    saved = SAVE_SECONDS * best.speed
    for name, count in (("checkpoint_every", saved), ("knn_every", max(saved, processed / 10))):
        changes[f"execution.{name}"] = _interval(count, images, changes["run.batch"])
    return best.config.changed(changes), why


def _batch(config: PretrainConfig, most: float) -> dict[str, Any]:
    """A batch of at most `most` images if that is larger, with the rates that suit it.

    With k times the batch the teacher's momentum is taken to the power of k (arXiv 2307.13813), and
    AdamW's learning rate is multiplied by the root of k; `optim.lr` itself is scaled by k.
    """
    batch = config.run.batch
    while 2 * batch <= min(most, LARGEST_BATCH):
        batch *= 2
    factor, teacher = batch / config.run.batch, config.teacher
    return {
        "run.batch": batch,
        "optim.lr": config.optim.lr / factor**0.5,
        "teacher.momentum": teacher.momentum**factor,
        "teacher.momentum_end": teacher.momentum_end**factor,
    }


def _interval(count: float, images: int, batch: int) -> str:
    """About `count` images as a duration: epochs of `images` if there are several, else steps."""
    if count >= images:
        return f"{round(count / images)} epochs"
    return f"{max(1, round(count / batch))} steps"
