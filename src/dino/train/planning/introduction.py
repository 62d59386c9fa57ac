"""The first lines of a run: what is trained on what, what it costs, and advice."""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta

import torch

from dino.data.views.view_spec import COLOUR_ONLY
from dino.distillation.step import Distillation
from dino.runtime import busy_cores, cores
from dino.train.config import PretrainConfig
from dino.train.planning.estimate import Estimate

DAY = 24 * 3600
FEW_IMAGES = 5_000
"""With fewer, features trained from random weights stay far behind published ones."""
NIGHT = 10 * 3600
"""Seconds that the advice for a run of more than a day plans for."""


def introduction(
    config: PretrainConfig,
    distillation: Distillation,
    estimate: Estimate,
    *,
    images: int,
    start: int,
    evaluated: int,
    recipe: str,
    data: str,
    run: str,
    initialized: bool,
) -> list[str]:
    """What is trained on what, where it is written, what it is expected to cost, and advice.

    Args:
        config: of the run.
        distillation: of the run.
        estimate: of this rank.
        images: of the source.
        start: steps done already.
        evaluated: images of all evaluations that are left.
        recipe: its name.
        data: the name of the images, for the commands of the advice.
        run: the run folder.
        initialized: whether the run starts from weights.
    """
    backbone, head = (
        sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for module in (distillation.student.backbone, distillation.student.head)
    )
    schedules, batch, pixels = distillation.schedules, config.run.batch, config.pixels
    total = schedules.end or schedules.total
    world, steps = distillation.ranks.world, total - start
    patch = f"/{config.model.patch_size}" if config.model.patch_size else ""
    lines = [
        f"{f'resuming at step {start}' if start else 'starting'}: {images:,} images, "
        f"{total:,} steps of {batch}, recipe {recipe}, {run}",
        f"network {config.model.arch}{patch} at {config.views.global_size} px: {backbone:.1f} M + "
        f"{head:.1f} M parameters (backbone + head), {distillation.device} x {world}, "
        f"{distillation.precision}",
        describe(estimate, batch, world, steps, evaluated),
    ]
    if pixels.channels != 3:
        lines.append(
            f"{pixels.channels} channels: without {', '.join(COLOUR_ONLY)}, which are for RGB"
        )
    alone = distillation.ranks.local_world == 1
    if distillation.device.type == "cpu" and alone and (busy := _busy()):
        lines.append(busy)
    if start:
        return lines
    where = f"--data {shlex.quote(data)} --out {shlex.quote(run)}"
    seconds = time_left(estimate, steps, evaluated, world)
    return lines + advice(config, None if initialized else images, recipe, where, seconds)


def _busy() -> str:
    """A warning if other processes need the cores, for which threads would wait; empty if not."""
    available, threads = cores(), torch.get_num_threads()
    others = busy_cores() if threads > 1 else 0.0
    fewer = max(1, available - round(others))
    if others < 0.5 or threads <= fewer:
        return ""
    return (
        f"warning: other processes use {others:.1f} of {available} cores, and threads wait for "
        f"each other: with OMP_NUM_THREADS={fewer} in front of the command it may be faster"
    )


def advice(
    config: PretrainConfig, images: int | None, recipe: str, where: str, seconds: float
) -> list[str]:
    """Warnings, each with a command that suits better; none for demo, laptop and budgets.

    Args:
        config: of the run.
        images: of the source; None if the run starts from weights, for which few suffice.
        recipe: its name.
        where: the images and the run folder as options of a command.
        seconds: that the run is expected to take.
    """
    if recipe in ("demo", "laptop", "budget"):
        return []
    lines = []
    few = images is not None and images < FEW_IMAGES
    if few and config.model.arch.startswith("vit") and recipe != "own":
        lines.append(
            f"warning: {images:,} images are few to train from random weights; published weights "
            f"are a better start: dino pretrain {recipe} {where} --init-from dino_vits16"
        )
    if seconds > DAY:
        epochs = config.run.duration.strip().split()[0] if "epoch" in config.run.duration else None
        shorter = ""
        if epochs is not None and (fit := int(float(epochs) * NIGHT / seconds)) >= 1:
            shorter = f", or {fit} epochs in a night: --epochs {fit}"
        lines.append(
            f"warning: this takes {duration(seconds)} on this machine; a small network takes "
            f"hours: dino pretrain laptop {where}{shorter}"
        )
    return lines


def time_left(estimate: Estimate, steps: int, evaluated: int, world: int) -> float:
    """Seconds of `steps` steps and of `evaluated` images, which the ranks share."""
    return estimate.step_seconds * steps + estimate.image_seconds * evaluated / world


def describe(estimate: Estimate, batch: int, world: int, steps: int, evaluated: int = 0) -> str:
    """The estimate in one line: speed, time to the end, memory, micro-batch.

    Args:
        estimate: of one rank.
        batch: images of a step, over all ranks.
        world: number of ranks.
        steps: that are left.
        evaluated: images of all evaluations that are left.
    """
    speed, left = batch / estimate.step_seconds, time_left(estimate, steps, evaluated, world)
    end = datetime.now() + timedelta(seconds=left)
    line = f"about {speed:,.{0 if speed >= 10 else 2}f} images/s: {duration(left)} to the end"
    line += f" ({end:%a %d %b %H:%M})" if left < 300 * DAY else ""
    if estimate.free is not None:
        per = " for each process" if world > 1 else ""
        line += f"; memory {estimate.peak / 2**30:.1f} of {estimate.free / 2**30:.1f} GiB free{per}"
    if estimate.micro_batch is not None:
        line += f"; micro-batches of {estimate.micro_batch}"
    return line


def duration(seconds: float) -> str:
    """A time in the two largest units that it has, such as "2 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / DAY:,.1f} days"
