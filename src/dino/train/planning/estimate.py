"""Time and memory of a run, measured before its first step, and the micro-batch that fits.

A few images of the run are read once. Then micro-batches of them, each twice as large as the one
before, go through student and teacher, forward and backward, until some seconds are over, or the
next one would not fit or exceed the batch. Nothing of the run changes: weights, statistics of batch
norm and random states are the same afterwards.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.data.loader import Batch, PretrainLoader, ViewGroup
from dino.distillation.step import Distillation
from dino.files import UserError
from dino.runtime import (
    cores,
    free_memory,
    gather_objects,
    memory_errors,
    memory_in_use,
    peak_memory,
    synchronize,
)

TRIAL_SECONDS = 4.0
"""No larger micro-batch is measured after this time; two are measured at least."""
READ_SECONDS, READ_IMAGES = 1.0, 32
"""Limits of the images that are read for the measurement."""
HEADROOM = 0.85
"""Of the free memory, at most this share is planned for."""
STEP_SECONDS = 8.0
"""A larger micro-batch is not chosen if it takes longer, so that progress is visible."""
WORKER_BYTES = 300 * 2**20
"""Of a process that reads images, without its batches."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to cost on this rank.

    Attributes:
        micro_batch: images that go through the networks at a time; None for all of a step.
        step_seconds: of one step, its images included.
        image_seconds: of one image in an evaluation.
        peak: bytes that a step takes beside what the process has before.
        free: bytes that were free before; None if the system does not say.
    """

    micro_batch: int | None
    step_seconds: float
    image_seconds: float
    peak: int
    free: int | None


class Trial(NamedTuple):
    """One measured micro-batch."""

    images: int
    seconds: float
    bytes: int


def estimate(
    distillation: Distillation,
    loader: PretrainLoader,
    views: Callable[[Batch], list[Tensor]],
    *,
    batch: int,
    micro_batch: int | None,
    step: int,
    workers: int,
) -> Estimate:
    """Measure micro-batches of the run's images, and choose the largest that fits.

    Args:
        distillation: of the run; a `micro_batch` that it has already is the user's.
        loader: of the run.
        views: turns a batch of the loader into normalised views on the device.
        batch: images of this rank in a step.
        micro_batch: the largest to choose, such as that of an interrupted run; None for `batch`.
        step: the first step that will be done.
        workers: processes of the loader.

    Raises:
        UserError: if the memory is too small, saying what fits.
    """
    device = distillation.device
    with _unchanged_random_states(device):
        sample, read_seconds = loader.sample(min(batch, READ_IMAGES), READ_SECONDS)
        start, free = memory_in_use(device), free_memory(device)
        if free is not None and device.type == "cpu":  # the ranks of a host share its memory
            free //= distillation.ranks.local_world
        available = math.inf if free is None else HEADROOM * free
        fixed = _fixed_bytes(distillation, sample, batch, workers)
        available -= fixed
        largest = min(batch, distillation.micro_batch or micro_batch or batch)

        def measure(images: int) -> Trial:
            started = time.perf_counter()
            distillation.rehearse(views(_tiled(sample, images)), step)
            synchronize(device)
            seconds = time.perf_counter() - started
            return Trial(images, seconds, max(0, peak_memory(device) - start))

        first = min(2 if distillation.needs_full_batch else 1, largest)
        trials = _trials(measure, first, largest, available)
        forward = _forward_seconds(distillation, views(_tiled(sample, trials[-1].images)))
    fits = largest
    if any(gather_objects(_bytes(trials, largest) > available)):
        fits = min(gather_objects(_fitting(trials, largest, available)))
        _check_fits(distillation, batch, fits, trials, fixed, free or 0)
        fits = distillation.micro_batch or fits
    if distillation.micro_batch is None and micro_batch is None:
        fits = min(gather_objects(_quick(distillation, trials[-1], fits)))
    last, cores_here = trials[-1], max(1, cores() // distillation.ranks.local_world)
    computing, reading = last.seconds / last.images * batch, read_seconds * batch
    if workers == 0:
        seconds = computing + reading
    elif device.type == "cpu":  # the workers take cores from the networks
        seconds = max(computing + reading / cores_here, reading / workers)
    else:
        seconds = max(computing, reading / min(workers, cores_here))
    peak = fixed + round(_bytes(trials, fits))
    micro = distillation.micro_batch or (None if fits == batch else fits)
    return Estimate(micro, seconds, forward + read_seconds, peak, free)


def _trials(
    measure: Callable[[int], Trial], first: int, largest: int, available: float
) -> list[Trial]:
    """Micro-batches of `first`, twice as many, ... images; all ranks measure the same ones."""
    trials: list[Trial] = []
    images, started = first, time.perf_counter()
    while True:
        with memory_errors("--execution.micro-batch"):
            trial = measure(images)
            if all(gather_objects(trial.seconds < TRIAL_SECONDS / 8)):  # kernels were prepared
                trial = trial._replace(seconds=min(trial.seconds, measure(images).seconds))
        trials.append(trial)
        images = min(2 * images, largest)
        slow = len(trials) > 1 and time.perf_counter() - started > TRIAL_SECONDS
        full = len(trials) > 1 and _bytes(trials, images) > available
        if any(gather_objects(trial.images == largest or slow or full)):
            return trials


@torch.no_grad()
def _forward_seconds(distillation: Distillation, groups: Sequence[Tensor]) -> float:
    """Seconds of an image in an evaluation; running statistics stay as they are."""
    backbone = distillation.teacher.backbone
    training = backbone.training
    backbone.eval()
    started = time.perf_counter()
    backbone(groups[0][0])
    synchronize(distillation.device)
    backbone.train(training)
    return (time.perf_counter() - started) / groups[0].shape[1]


def _bytes(trials: Sequence[Trial], images: int) -> float:
    """Bytes of a micro-batch, linear in its images through the two largest that were measured."""
    last = trials[-1]
    slope = last.bytes / last.images
    if len(trials) > 1:
        earlier = trials[-2]
        slope = max(0.0, (last.bytes - earlier.bytes) / (last.images - earlier.images))
    return last.bytes + slope * (images - last.images)


def _fitting(trials: Sequence[Trial], largest: int, available: float) -> int:
    """The largest micro-batch that fits, of parts of about equal size; 0 if none does."""
    fitting = next((n for n in range(largest, 0, -1) if _bytes(trials, n) <= available), 0)
    return math.ceil(largest / math.ceil(largest / fitting)) if fitting else 0


def _quick(distillation: Distillation, trial: Trial, images: int) -> int:
    """At most `images` that take few seconds, so that progress is visible: a power of two."""
    if distillation.needs_full_batch or trial.seconds / trial.images * images < STEP_SECONDS:
        return images
    quick = STEP_SECONDS * trial.images / trial.seconds
    return 2 ** max(0, math.floor(math.log2(quick)))


def _check_fits(
    distillation: Distillation,
    batch: int,
    fits: int,
    trials: Sequence[Trial],
    fixed: int,
    free: int,
) -> None:
    """Refuse what cannot be split into micro-batches that fit."""

    def gib(images: int) -> str:
        needed = (fixed + _bytes(trials, images)) / 2**30
        room = f"{HEADROOM:.0%} of the {free / 2**30:.1f} GiB that are free"
        return f"about {needed:.1f} GiB, and may take {room}"

    chosen = distillation.micro_batch
    if not fits:
        raise UserError(
            f"a step of {batch} images needs {gib(1)}, even with one image at a time: lower "
            "--batch or the views' sizes and number, or take a smaller --model.arch"
        )
    if needs := distillation.needs_full_batch:
        raise UserError(
            f"a step of {batch} images for each process needs {gib(batch)}; {needs} needs all "
            f"images of a step at once: take --batch {fits} for each process, or smaller views"
        )
    if chosen is not None and fixed + _bytes(trials, chosen) > free:
        raise UserError(
            f"micro-batches of {chosen} images need {gib(chosen)}: "
            f"take --execution.micro-batch {fits}"
        )


def _fixed_bytes(distillation: Distillation, sample: Batch, batch: int, workers: int) -> int:
    """Bytes of a step that do not depend on the micro-batch and were not allocated before."""
    moments = 0
    if not distillation.optimizer.state:
        moments = 2 * sum(4 * p.numel() for p in distillation.student.parameters())
    copies = 0
    if distillation.device.type == "cpu" and distillation.ranks.main:  # of a checkpoint's tensors
        copies = 4 * sum(4 * p.numel() for p in distillation.student.parameters())
    pixels = sum(group.images[:, 0].numel() for group in sample.groups)
    batches = 2 * workers + 1  # of uint8, of which one is also in float32, and read twice
    return moments + copies + batch * pixels * (batches + 8) + workers * WORKER_BYTES


def _tiled(sample: Batch, images: int) -> Batch:
    """A batch of `images` images, which are those of `sample` again and again."""
    places = torch.arange(images) % len(sample.index)
    groups = [
        ViewGroup(group.images[:, places], group.params[:, places]) for group in sample.groups
    ]
    return Batch(groups, sample.index[places], sample.epoch)


@contextmanager
def _unchanged_random_states(device: torch.device) -> Iterator[None]:
    """The global random states are the same after the body (a user's data set may draw)."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
