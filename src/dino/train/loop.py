"""The training loop: views -> student and teacher -> step -> record, as Algorithm 1 reads.

The run folder is plain files: `config.json`, `metrics.jsonl`, `checkpoints/`, `refused.jsonl`
(if a step was refused), `skipped.csv` (if images could not be used), `teacher.safetensors` (the
newest), `best.safetensors` (by k-NN).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino.data.loader import Batch, PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import Source
from dino.data.views.photometric import augment
from dino.distillation.collapse import Monitor, effective_rank, feature_spread
from dino.distillation.schedules import Schedules, in_steps
from dino.distillation.step import StepReport
from dino.evaluate.protocol import Evaluation
from dino.files import UserError, atomic_json, read_json
from dino.runtime import Ranks, barrier, process_group
from dino.train.build import build
from dino.train.checkpoint import Checkpoints
from dino.train.config import PretrainConfig, differences
from dino.train.evaluation_tracker import Watch
from dino.train.metrics_log import Window
from dino.train.run_log import Telling
from dino.train.signals import stop_on_signals
from dino.train.skipped_images import Skipped
from dino.train.warm_start import Initial
from dino.weights.load import save


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


def train(
    config: PretrainConfig,
    source: Source,
    run: str | Path,
    *,
    device: torch.device,
    about: dict[str, Any] | None = None,
    evaluations: Sequence[Evaluation] = (),
    initial: Initial | None = None,
) -> Result:
    """Train until the end of the run, from its last checkpoint if it holds one.

    Args:
        config: all settings.
        source: the images.
        run: the run folder; made if there is none.
        device: this process's device.
        about: what `config.json` and the weights say of the data and the recipe.
        evaluations: measured on the teacher every `execution.knn_every`, by the main rank.
        initial: weights to start from instead of random numbers (`train.initial.begin`); they are
            measured before the first step, and a fall below that is reported.

    Raises:
        UserError: for settings that cannot work, a folder that holds another run, a full disk, or
            `execution.max_refused` refused steps in a row, or more images than
            `execution.max_skipped` that cannot be used.
    """
    with process_group(device) as ranks:
        doubts = config.check(ranks.world)
        loop = _Loop(config, source, Path(run), device, ranks, about or {}, evaluations, initial)
        return loop.run_to_end(doubts)


class _Seen(NamedTuple):
    """A step that was launched, and the batch it was launched on."""

    step: int
    batch: Batch
    report: StepReport


class _Loop:
    def __init__(
        self,
        config: PretrainConfig,
        source: Source,
        run: Path,
        device: torch.device,
        ranks: Ranks,
        about: dict[str, Any],
        evaluations: Sequence[Evaluation],
        initial: Initial | None,
    ) -> None:
        self.config, self.source, self.run = config, source, run
        self.device, self.ranks, self.about, self.initial = device, ranks, about, initial
        execution = config.execution
        self.steps_per_epoch = EpochSampler(
            len(source), config.run.batch, config.run.seed
        ).steps_per_epoch
        self.schedules: Schedules = config.schedules(self.steps_per_epoch)
        self.log_every = self._every(execution.log_every)
        self.save_every = self._every(execution.checkpoint_every)
        self.knn_every = self._every(execution.knn_every)
        self.checkpoints = Checkpoints(run / "checkpoints", execution.keep)
        self._compare_folder()
        self.skipped = Skipped(run, len(source), execution.max_skipped)
        self.distillation = build(config, self.schedules, device, ranks, initial)
        self.refused = self.refused_in_row = self.start = 0
        self.watch = Watch(evaluations)
        if (last := self.checkpoints.last()) is not None:
            state = self.checkpoints.restore(self.distillation, last)
            self.start, self.refused = state["step"], state["refused"]
            self.watch.restore(state)
        elif initial is not None:
            initial.fill(self.distillation)
        self._claim_folder()
        self.monitor = Monitor(config.head.prototypes)
        self.window = Window()

    def _every(self, duration: str) -> int:
        return in_steps(duration, self.steps_per_epoch, self.schedules.total)

    def _defining(self) -> dict[str, Any]:
        origin = self.initial.defining() if self.initial else {}
        return {**self.config.defining(), **origin, "data.images": len(self.source)}

    def _compare_folder(self) -> None:
        """Refuse a folder that holds another configuration."""
        path = self.run / "config.json"
        if path.exists():
            found = differences(read_json(path)["defining"], self._defining())
            if found:
                raise UserError(
                    f"{self.run} holds a run with another configuration ({'; '.join(found)}): "
                    "choose another --out, or the same settings to resume"
                )

    def _claim_folder(self) -> None:
        """Write `config.json`."""
        barrier()  # every rank has compared before the main rank writes
        if self.ranks.main:
            atomic_json(
                self.run / "config.json",
                {
                    "about": self.about,
                    "defining": self._defining(),
                    "execution": asdict(self.config.execution),
                    "steps_per_epoch": self.steps_per_epoch,
                    "total_steps": self.schedules.total,
                    **({"init": self.initial.record()} if self.initial else {}),
                },
            )

    # ------------------------------------------------------------------ the loop
    def run_to_end(self, doubts: Sequence[str]) -> Result:
        """Algorithm 1, from the first step that is not done."""
        step, total = self.start, self.schedules.total
        if step >= total:
            return self._result(step)
        telling = Telling(self.run, self.config, self.ranks, total, step)
        with telling as self.tell, stop_on_signals(self.ranks) as stop:
            self._begin(doubts)
            loader = iter(self._loader())
            launched: deque[_Seen] = deque()
            while step < total:
                waiting = time.perf_counter()
                batch = next(loader)
                self.window.waited += time.perf_counter() - waiting
                self.skipped.note(batch.skipped)

                report = self.distillation.step(self._views(batch), step)
                launched.append(_Seen(step, batch, report))
                step += 1
                if self._due(step, self.log_every) or stop.is_set() or step == total:
                    self._share_skipped()
                # A GPU is asked for the step before, so that it never waits for the host.
                while len(launched) > (1 if self.device.type == "cuda" else 0):
                    self._look(launched.popleft())
                boundary = self._due(step, self.save_every) or self._due(step, self.knn_every)
                if boundary or stop.is_set() or step == total:
                    while launched:
                        self._look(launched.popleft())
                if self.watch.evaluations and self._due(step, self.knn_every):
                    self._evaluate(step)
                if self._due(step, self.save_every) or stop.is_set() or step == total:
                    self._save(step)
                if stop.is_set() and step < total:
                    self.tell.say(
                        f"stopped at step {step}: run the same command again to go on", "bold"
                    )
                    break
            self.tell.skipped(self.skipped, last=True)
        return self._result(step)

    def _begin(self, doubts: Sequence[str]) -> None:
        self.tell.greet(self.distillation, len(self.source), self.device, doubts)
        if self.initial is not None:
            for note in self.initial.notes:
                self.tell.say(note, "yellow" if note.startswith("warning") else "")
            if self.start == 0 and self.knn_every and self.watch.evaluations:
                self._evaluate(0)

    def _result(self, step: int) -> Result:
        total = self.schedules.total
        return Result(self.run, step, total, self.refused, len(self.skipped), self.watch.measured)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.schedules.total)

    def _loader(self) -> Iterator[Batch]:
        run = self.config.run
        workers = self.config.execution.workers
        if workers is None:
            workers = min(16, max(1, (os.cpu_count() or 1) // self._local_world() - 1))
        sampler = EpochSampler(
            len(self.source),
            run.batch,
            run.seed,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start_step=self.start,
            stop_step=self.schedules.total,
            blocks=self.source.blocks,
        )
        loader: Iterator[Batch] = iter(
            PretrainLoader(
                self.source,
                self.config.views.specs(),
                sampler,
                seed=run.seed,
                channels=self.config.pixels.channels,
                workers=workers,
                pin=self.device.type == "cuda",
            )
        )
        return loader

    @staticmethod
    def _local_world() -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def _views(self, batch: Batch) -> list[Tensor]:
        """Normalised float views on the device, group by group."""
        views = []
        for group in batch.groups:
            group = group.to(self.device)
            flat = augment(
                group.images.flatten(0, 1),
                group.params.flatten(0, 1),
                self.config.pixels.mean,
                self.config.pixels.std,
            )
            views.append(flat.unflatten(0, group.images.shape[:2]))
        return views

    # ------------------------------------------------------------------ what a step showed
    def _look(self, seen: _Seen) -> None:
        """Read a step's report: refusals, collapse, metrics."""
        report, done = seen.report, seen.step + 1
        loss, entropy = report.loss.item(), report.teacher_entropy.item()
        if bool(report.refused.item()):
            self._refuse(seen, loss)
            return
        self.refused_in_row = 0
        advice = self.monitor.watch(entropy, loss - entropy)
        self.window.add(loss, entropy, len(seen.batch.index) * self.ranks.world)
        if not self.ranks.main:
            return
        self.tell.advance(done)
        if advice:
            self.tell.say(f"step {done}: {advice}", "bold red")
            self.tell.write({"step": done, "collapse": self.monitor.called})
        if self._due(done, self.log_every):
            self.tell.write(self._metrics(seen))

    def _metrics(self, seen: _Seen) -> dict[str, Any]:
        step, schedules = seen.step, self.schedules
        line = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            **self.window.close(),
            "feature_std": feature_spread(seen.report.features).item(),
            "effective_rank": effective_rank(seen.report.features).item(),
            "lr": schedules.lr_at(step),
            "weight_decay": schedules.weight_decay_at(step),
            "momentum": schedules.momentum_at(step),
            "teacher_temp": schedules.temperature_at(step),
            "refused": self.refused,
            "skipped": len(self.skipped),
        }
        return line

    def _share_skipped(self) -> None:
        self.skipped.share_and_check(self.ranks)
        self.tell.skipped(self.skipped)

    def _refuse(self, seen: _Seen, loss: float) -> None:
        self.refused += 1
        self.refused_in_row += 1
        paths = [self.source.path(int(index)) for index in seen.batch.index]
        self.tell.refused(seen.step + 1, loss, paths)
        if self.refused_in_row >= self.config.execution.max_refused:
            last = self.checkpoints.last()
            raise UserError(
                f"{self.refused_in_row} steps in a row were not finite, the last at step "
                f"{seen.step + 1}: lower optim.lr or set execution.precision fp32; "
                f"{f'{last.name} is whole' if last else 'no checkpoint was saved yet'}"
            )

    # ------------------------------------------------------------------ what is kept
    def _evaluate(self, step: int) -> None:
        """Measure the teacher; all ranks share the work, the main rank writes."""
        started = time.perf_counter()
        for name, values in self.watch.measure(self.distillation.teacher.backbone).items():
            self.tell.measured(step, name, values)
        if step == 0:
            self.watch.start = self.watch.leading
        if fallen := self.watch.fall():
            self.tell.write({"step": step, "below_start": fallen})
            self.tell.say(
                f"step {step}: {fallen:.1f} points below the start ({self.watch.start:.1f}): the "
                "weights are being unlearned; try a lower --optim.lr (a tenth), a longer "
                "--optim.freeze-backbone, a higher --teacher.momentum",
                "bold red",
            )
        if self.watch.improved() and self.ranks.main:
            self._write_teacher("best.safetensors", step)
        self.window.skip(time.perf_counter() - started)

    def _save(self, step: int) -> None:
        if self.ranks.main:
            started = time.perf_counter()
            state = {"refused": self.refused, **self.watch.state()}
            self.checkpoints.save(self.distillation, step, state)
            self._write_teacher("teacher.safetensors", step)
            self.window.skip(time.perf_counter() - started)
        barrier()

    def _write_teacher(self, name: str, step: int) -> None:
        about = {
            **self.about,
            "step": step,
            "steps": self.schedules.total,
            "measured": self.watch.measured,
        }
        save(self.distillation.teacher.backbone, self.run / name, about)
