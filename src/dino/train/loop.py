"""The training loop: views -> student and teacher -> step, as Algorithm 1 of the paper reads.

Everything is put together and checked before the run folder (`train.run_folder`) is written to.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino.data.loader import Batch, PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import Source
from dino.distillation.collapse import CollapseMonitor
from dino.distillation.schedules import Schedules, in_seconds, in_steps
from dino.distillation.step import StepReport
from dino.evaluate.protocol import Evaluation
from dino.features.cache import versions
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.rendezvous import doing
from dino.runtime import (
    all_sum,
    barrier,
    default_workers,
    gather_objects,
    memory_errors,
    process_group,
    require_same,
    same_errors,
)
from dino.settings import validated
from dino.train.background import Background
from dino.train.build import build, check_memory, float_views
from dino.train.checkpoint import Checkpoints, RunState, tensors_of, with_tensors
from dino.train.config import PretrainConfig
from dino.train.evaluation_tracker import EvaluationTracker
from dino.train.planning.estimate import estimate
from dino.train.planning.introduction import introduction
from dino.train.planning.time_budget import FITS, UNKNOWN, TimeBudget
from dino.train.run_folder import RunFolder, describe_images
from dino.train.run_log import RunLog, flat, read_metrics
from dino.train.signals import stop_on_signals
from dino.train.sinks import SINKS
from dino.train.skipped_images import SkippedImages
from dino.train.stall_watch import STALLED, StallWatch
from dino.train.step_metrics import StepMetrics
from dino.train.warm_start import Initial
from dino.weights.files import dino_metadata, file_hash, read_header
from dino.weights.load import load, save


@dataclass
class Result:
    """How a call of `train` ended.

    Attributes:
        run: the run folder.
        step: steps done in all.
        total: steps of the run.
        refused: steps that were not finite and therefore not taken.
        skipped: different images that could not be used.
        measured: the newest evaluation, empty without labels.
    """

    run: Path
    step: int
    total: int
    refused: int
    skipped: int = 0
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.step >= self.total

    @property
    def report(self) -> Path:
        """The page of the run, which is written at each checkpoint."""
        return self.run / "report.html"

    def backbone(self, device: str | torch.device = "cpu") -> Backbone:
        """The trained network, as `dino.load` gives it."""
        return load(self.run, device)

    def metrics(self) -> list[dict[str, Any]]:
        """What was measured, a flat dictionary a step, for `pandas.DataFrame(result.metrics())`.

        Evaluations have the names of TensorBoard's, such as `knn/k20`.
        """
        rows: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.run):
            rows.setdefault(line["step"], {}).update(flat(line))
        return list(rows.values())


def train(
    config: PretrainConfig,
    source: Source,
    run: str | Path,
    *,
    device: torch.device,
    about: dict[str, Any] | None = None,
    evaluations: Sequence[Evaluation] = (),
    initial: Initial | None = None,
    evaluated_after: int = 0,
    dry_run: bool = False,
    after_checkpoint: Callable[[int], None] | None = None,
    started: float | None = None,
) -> Result:
    """Train until the end of the run, from its last checkpoint if it holds one.

    Args:
        config: all settings.
        source: the images.
        run: the run folder; made if there is none.
        device: this process's device.
        about: the data and the recipe, for `config.json` and the files of weights.
        evaluations: measured on the teacher every `execution.knn_every`, by all ranks.
        initial: weights to start from instead of random numbers (`train.warm_start.begin`); they
            are measured before the first step, and a fall below that is reported.
        evaluated_after: images that the caller evaluates after the training, for the estimate.
        dry_run: print the expected time and memory, and write and train nothing.
        after_checkpoint: called by the main rank with the number of steps done.
        started: when the work for a run that takes a certain time began, by `time.monotonic`; None
            for now.

    Raises:
        UserError: for settings that cannot work, a folder that holds another run or in which
            another process trains, a full disk, `execution.max_refused` refused steps in a row, or
            more images than `execution.max_skipped` that cannot be used.
    """
    started = time.monotonic() if started is None else started
    with process_group(device) as ranks:
        with same_errors():
            config = validated(config)
            warnings = config.check()
            loop = _Loop(config, source, RunFolder(run, ranks), device, evaluations, initial)
        loop.started, loop.evaluated_after = started, evaluated_after
        loop.build()
        if dry_run:
            return loop.dry_run(about or {})
        with loop.folder.locked() as unlocked:
            loop.open_folder(about or {}, [*warnings, *unlocked])
            loop.after_checkpoint = after_checkpoint
            return loop.run()


OWN = ("workers", "keep", "keep_every", *SINKS)
"""Settings of `execution` that may differ between ranks."""


class LaunchedStep(NamedTuple):
    """A step whose report is not read yet, and the indices of this rank's images.

    `signalled` is the number of ranks that a signal had reached after the step, on the device.
    """

    step: int
    images: Tensor
    report: StepReport
    signalled: Tensor


class _Loop:
    """What a run consists of; `run` is the loop itself."""

    log: RunLog
    warnings: Sequence[str] = ()
    after_checkpoint: Callable[[int], None] | None = None
    started: float
    evaluated_after = 0
    budget: TimeBudget | None = None

    def __init__(
        self,
        config: PretrainConfig,
        source: Source,
        folder: RunFolder,
        device: torch.device,
        evaluations: Sequence[Evaluation],
        initial: Initial | None,
    ) -> None:
        self.config, self.source, self.folder, self.device = config, source, folder, device
        self.ranks = ranks = folder.ranks
        self.initial = initial
        batch, seed = config.run.batch, config.run.seed
        self.sampler = EpochSampler(
            len(source), batch, seed, ranks.rank, ranks.world, blocks=source.blocks
        )
        self.seconds = in_seconds(config.run.duration)
        total = None if self.seconds is None else UNKNOWN
        schedules = config.schedules(self.sampler.steps_per_epoch, total)
        self.execution = execution = config.execution
        self.total = schedules.total
        if self.seconds is None:
            self.sampler.stop_step = self.total
        self.defining = {
            **config.defining(),
            **(initial.defining() if initial else {}),
            "data.images": len(source),
        }
        self.images = describe_images(source)
        folder.compare(self.defining, self.images)
        check_memory(config, device, ranks, initial)
        self.schedules = schedules
        self.checkpoints = Checkpoints(
            folder.checkpoints, execution.keep, self._steps(execution.keep_every)
        )
        self.state = RunState(0)
        self.tracker = EvaluationTracker(evaluations, self.state)
        self.monitor = CollapseMonitor(config.head.prototypes)
        self.refused_in_row, self.stopping = 0, False
        self.background = Background()

    def build(self) -> None:
        """Put together what is trained, once all ranks are known to train the same."""
        config, execution = self.config, self.execution
        require_same(
            {
                **self.defining,
                **{f"execution.{n}": v for n, v in asdict(execution).items() if n not in OWN},
                **{f"image of {n}": v for n, v in reversed(self.images.items())},
                "evaluation": [
                    [e.name, e.num_images, e.num_queries] for e in self.tracker.evaluations
                ],
                "version": [f"{name} {number}" for name, number in versions().items()],
            }
        )
        self.distillation = build(config, self.schedules, self.device, self.ranks, self.initial)
        workers = execution.workers
        self.workers = default_workers() if workers is None else workers
        self.loader = PretrainLoader(
            self.source,
            config.views.specs(),
            self.sampler,
            seed=config.run.seed,
            channels=config.pixels.channels,
            workers=self.workers,
            pin=self.device.type == "cuda",
        )
        full = self.distillation.needs_full_batch
        self.memory_option = "--batch" if full else "--execution.micro-batch"
        share = config.run.batch // self.ranks.world
        self.micro_batch = None if full else self.folder.micro_batch(share)
        if self.initial is not None and self.checkpoints.last() is None:
            self.initial.fill(self.distillation)

    def open_folder(self, about: dict[str, Any], warnings: Sequence[str]) -> None:
        """Read the last checkpoint if there is one, and write `config.json`; under the lock."""
        self.about, self.warnings = about, warnings
        count, limit = len(self.source), self.execution.max_skipped
        self.skipped = SkippedImages(self.folder.path, count, limit)
        self._restore()
        if self.state.step < self.total:
            self._estimate_cost()
        barrier()  # every rank has compared and read before the main rank writes
        self.content = {
            "about": about,
            "defining": self.defining,
            "images": self.images,
            "execution": asdict(self.execution),
            "steps_per_epoch": self.sampler.steps_per_epoch,
            "total_steps": self.total,
            "micro_batch": self.micro_batch or self.config.run.batch // self.ranks.world,
            **({"init": self.initial.record()} if self.initial else {}),
        }
        self.folder.write_config(self.content)

    def dry_run(self, about: dict[str, Any]) -> Result:
        """Print what `run` would begin with."""
        self.about = about
        self._restore()
        if self.state.step >= self.total:
            raise UserError(f"{self.folder.path} holds a finished run: choose another --out")
        self._estimate_cost()
        console = Console(stderr=True, quiet=not self.ranks.main)
        for line in self._introduction():
            console.print(line, soft_wrap=True)
        return Result(self.folder.path, self.state.step, self.total, self.state.refused)

    def _restore(self) -> None:
        """Read the last checkpoint if there is one."""
        with same_errors():
            last, damages = self.checkpoints.newest()
        hashes = None if last is None else [last.name, file_hash(last / "state.json")]
        require_same({"checkpoint": hashes})
        self.warnings = [*self.warnings, *damages]
        if last is not None:
            with same_errors():
                self.state = self.checkpoints.restore(self.distillation, last)
            self.tracker.state, self.sampler.start_step = self.state, self.state.step
        if self.seconds is not None:
            before = self.state.timed
            self.budget = TimeBudget(self.seconds, self.started, before.get("seconds", 0.0))
            if before.get("budget") == self.seconds and {"end", "total", "position"} <= {*before}:
                self.total = int(before["end"])
                schedules = self._schedules(int(before["total"]))
                anchor = (self.state.step, before["position"])
                self.distillation.schedules = replace(schedules, end=self.total, anchor=anchor)

    def _estimate_cost(self) -> None:
        """Measure time and memory, and take the micro-batch that fits."""
        self.estimate = estimate(
            self.distillation,
            self.loader,
            self._views,
            batch=self.config.run.batch // self.ranks.world,
            micro_batch=self.micro_batch,
            step=self.state.step,
            workers=self.workers,
        )
        before, self.micro_batch = self.micro_batch, self.estimate.micro_batch
        self.distillation.micro_batch = self.micro_batch
        if self.execution.micro_batch is None and (self.micro_batch or math.inf) < (before or 0):
            self.warnings = [
                *self.warnings,
                f"less memory is free than when the run began: {self.micro_batch} images at a time "
                f"instead of {before}, so the result is the same up to rounding, not bit for bit",
            ]
        self.image_seconds = self.estimate.image_seconds
        if self.budget is not None:
            begins = self.total == UNKNOWN
            for _ in range(2):  # the number of evaluations may depend on that of steps
                self._fit_total(self.budget, self.state.step, self.estimate.step_seconds)
            if begins:
                self.distillation.schedules = self._schedules(self.total)

    def _fit_total(self, budget: TimeBudget, step: int, step_seconds: float) -> None:
        """End the run, and all schedules, with its time, at this speed."""
        images = 0 if self.total == UNKNOWN else self._evaluated()
        evaluations = images * self.image_seconds / self.ranks.world
        self.total = gather_objects(budget.total(step, step_seconds, evaluations))[0]
        self.distillation.schedules = self.distillation.schedules.ending(self.total, step)

    def _schedules(self, total: int) -> Schedules:
        return self.config.schedules(self.sampler.steps_per_epoch, total)

    def _introduction(self) -> list[str]:
        return introduction(
            self.config,
            self.distillation,
            self.estimate,
            images=len(self.source),
            start=self.state.step,
            evaluated=self._evaluated(),
            recipe=str(self.about.get("recipe", "own")),
            data=str(self.about.get("data", "DATA")),
            run=str(self.folder.path),
            initialized=self.initial is not None,
        )

    def run(self) -> Result:
        """Algorithm 1, from the first step that is not done."""
        step = self.state.step
        if step >= self.total:
            self._write_missing_teacher()
            return self._result(step)
        execution = self.execution
        sinks = [name for name in SINKS if getattr(execution, name)]
        self.metrics = StepMetrics(self.distillation.schedules, self.config.run.batch)
        self.log = RunLog(
            self.folder.path,
            self.ranks,
            self.total,
            step,
            sinks=sinks,
            settings=self.config.flat(),
        )
        too_long = max(STALLED, 10 * self.estimate.step_seconds)
        stalls = StallWatch(partial(self.log.say, style="yellow"), too_long)
        with self.log, stop_on_signals(self.ranks) as signal, self.background, stalls:
            self._begin()
            batches = iter(self.loader)
            launched: deque[LaunchedStep] = deque()
            while step < self.total and not self.stopping:
                with self.metrics.waiting(), doing(f"reading the images of step {step + 1}"):
                    batch = next(batches)
                with memory_errors(self.memory_option), doing(f"training step {step + 1}"):
                    report = self.distillation.step(self._views(batch), step, self._within(step))
                signalled = torch.full((), float(signal.is_set()), device=self.device)
                launched.append(LaunchedStep(step, batch.index, report, all_sum(signalled)))
                self.skipped.add(batch.skipped)
                step += 1
                self._follow_speed(step)

                if self._due(step, execution.log_every):
                    self._share_skipped()
                # A GPU's report is read one step later, so that it never waits for the host.
                self._read(launched, newest=1 if self.device.type == "cuda" else 0)
                save = self._due(step, execution.checkpoint_every)
                evaluate = self._due(step, execution.knn_every)
                if save or evaluate or self.stopping:
                    self._read(launched)
                if self.stopping:
                    self._share_skipped()
                if evaluate:
                    self._evaluate(step)
                if save or self.stopping:
                    self._save(step)
                self.background.check()
            with doing("saving"):
                self.background.finish()
            barrier()
            if step < self.total:
                self.log.say(f"stopped at step {step}: the same command resumes the run", "bold")
            self.log.skipped(self.skipped, last=True)
        return self._result(step)

    def _begin(self) -> None:
        self.log.begin(self._introduction(), self.estimate.step_seconds)
        if self.budget is not None:
            self.budget.speed(self.state.step)
        notes = [f"warning: {warning}" for warning in self.warnings]
        notes += self.initial.notes if self.initial else ()
        for note in notes:
            self.log.say(note, "yellow" if note.startswith("warning") else "")
        if self.initial and self.state.step == 0 and self._due(0, self.execution.knn_every):
            self._evaluate(0)

    def _follow_speed(self, step: int) -> None:
        """Fit the total of a run whose duration is a time: often at first, then `FITS` times."""
        done = step - self.sampler.start_step
        often = done & (done - 1) == 0
        if self.budget is None or step >= self.total - 1:
            return
        if step % max(1, self.total // FITS) and not often:
            return
        if (step_seconds := self.budget.speed(step)) is not None:
            self._fit_total(self.budget, step, step_seconds)
            self.log.total, self.metrics.schedules = self.total, self.distillation.schedules

    def _evaluated(self) -> int:
        """The number of images of all evaluations that are left, of the caller's too."""
        every = self._steps(self.execution.knn_every)
        times = 0
        if every:
            times = -(-self.total // every) - self.state.step // every
        return self.evaluated_after + times * sum(
            each.num_images for each in self.tracker.evaluations
        )

    def _within(self, step: int) -> Callable[[float], object] | None:
        """Shows the progress of a step; on a GPU a launched step is not yet done."""
        if self.device.type == "cuda":
            return None
        return lambda share: self.log.advance(step + share)

    def _steps(self, duration: str) -> int:
        return in_steps(duration, self.sampler.steps_per_epoch, self.total)

    def _due(self, step: int, duration: str) -> bool:
        every = self._steps(duration)
        return every > 0 and (step % every == 0 or step == self.total)

    def _views(self, batch: Batch) -> list[Tensor]:
        return float_views(batch, self.config.pixels, self.device)

    def _read(self, launched: deque[LaunchedStep], newest: int = 0) -> None:
        """Read the reports of all launched steps but the `newest`: signals, refusal, metrics."""
        while len(launched) > newest:
            step, images, report, signalled = launched.popleft()
            loss, entropy = report.loss.item(), report.teacher_entropy.item()
            self.stopping |= signalled.item() > 0
            if report.found_inf.item():
                self._refuse(step + 1, loss, images)
                continue
            self.refused_in_row = 0
            divergence = report.terms.get("cross_entropy")  # other losses have none
            kl = math.nan if divergence is None else divergence.item() - entropy
            spread = report.target_spread.item()
            advice = self.monitor.update(entropy, kl, spread)
            measures = {"teacher_entropy": entropy, "kl": kl, "target_spread": spread}
            self.metrics.add({"loss": loss, **{n: x for n, x in measures.items() if x == x}})
            self.log.advance(step + 1)
            if advice:
                self.log.say(f"step {step + 1}: {advice}", "bold red")
                self.log.write({"step": step + 1, "collapse": self.monitor.collapse})
            if self._due(step + 1, self.execution.log_every):
                counts = {"refused": self.state.refused, "skipped": len(self.skipped)}
                self.log.write({**self.metrics.line(step, report), **counts})

    def _refuse(self, step: int, loss: float, images: Tensor) -> None:
        self.state.refused += 1
        self.refused_in_row += 1
        self.log.refused(step, loss, [self.source.path(int(index)) for index in images])
        if self.refused_in_row >= self.execution.max_refused:
            self.background.finish()
            last = self.checkpoints.last()
            raise UserError(
                f"{self.refused_in_row} steps in a row were not finite, the last at step {step}: "
                "lower optim.lr or set execution.precision fp32; "
                f"{f'{last.name} is complete' if last else 'no checkpoint was saved yet'}"
            )

    def _share_skipped(self) -> None:
        self.skipped.share_and_check(self.ranks)
        self.log.skipped(self.skipped)

    def _evaluate(self, step: int) -> None:
        """Measure the teacher; all ranks share the work, the main rank writes."""
        if not self.tracker.evaluations:
            return
        started = time.monotonic()
        with self.metrics.paused(), doing(f"evaluating step {step}"):
            measured = self.tracker.measure(self.distillation.teacher.backbone)
            for name, values in measured.items():
                self.log.evaluation(step, name, values)
            if step == 0:
                self.state.start = self.tracker.leading
            if fallen := self.tracker.fall():
                self.log.write({"step": step, "below_start": fallen})
                self.log.say(
                    f"step {step}: {fallen:.1f} points below the start "
                    f"({self.state.start:.1f}): the weights are being unlearned; try a lower "
                    "--optim.lr (a tenth), a longer --optim.freeze-backbone, a higher "
                    "--teacher.momentum",
                    "bold red",
                )
            if self.tracker.improved() and self.ranks.main:
                state = replace(self.state, step=step)
                self._write_teacher(self.folder.best, state, self.distillation.teacher.backbone)
        if self.budget is not None:
            self.budget.evaluated(seconds := time.monotonic() - started)
            images = sum(evaluation.num_images for evaluation in self.tracker.evaluations)
            self.image_seconds = seconds * self.ranks.world / images

    def _save(self, step: int) -> None:
        self.state.step = step
        if self.budget is not None:
            schedules = self.distillation.schedules
            self.state.timed = {
                "budget": self.budget.seconds,
                "seconds": self.budget.spent,
                "end": self.total,
                "total": schedules.total,
                "position": schedules.position(step),
            }
            self.folder.write_config({**self.content, "total_steps": self.total})
        with self.metrics.paused(), doing(f"saving step {step}"):
            self.background.finish()  # no two copies at once
            if self.ranks.main:
                tensors = tensors_of(self.distillation, copied=True)
                teacher = with_tensors(self.distillation.teacher, tensors["teacher"]).backbone
                state = copy.deepcopy(self.state)
                self.background.start(partial(self._write, tensors, teacher, state))
        barrier()

    def _write(self, tensors: Any, teacher: Backbone, state: RunState) -> None:
        """Write copies of what evolves, in the background (main rank)."""
        # The teacher first: a run that is killed before LAST is replaced writes it again.
        self._write_teacher(self.folder.teacher, state, teacher)
        self.checkpoints.write(tensors, state)
        if self.after_checkpoint is not None:
            self.after_checkpoint(state.step)

    def _write_missing_teacher(self) -> None:
        """Write the teacher of a finished run, if its file is missing, damaged or older."""
        path = self.folder.teacher
        try:
            found = dino_metadata(read_header(path), path)
        except (OSError, UserError):
            found = None
        if self.ranks.main and (found is None or found["about"].get("step") != self.state.step):
            self._write_teacher(path, self.state, self.distillation.teacher.backbone)

    def _write_teacher(self, path: Path, state: RunState, teacher: Backbone) -> None:
        about = {**self.about, "step": state.step, "steps": self.total, "measured": state.measured}
        save(teacher, path, about)

    def _result(self, step: int) -> Result:
        refused, skipped, measured = self.state.refused, len(self.skipped), self.state.measured
        return Result(self.folder.path, step, self.total, refused, skipped, measured)
