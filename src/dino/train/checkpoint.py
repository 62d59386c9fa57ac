"""Checkpoints: plain files, no pickle, and always one that is complete.

    checkpoints/step_00001200/   student, teacher, optimizer, loss (.safetensors), state.json
    checkpoints/LAST             the name of the newest complete checkpoint

A checkpoint is written into a hidden sibling folder, flushed, and renamed; then LAST is replaced.
A process that dies at any moment leaves LAST naming a complete checkpoint; what it left half
written is removed by the next run in the folder (`RunFolder.locked`).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino.distillation.step import Distillation
from dino.files import (
    UserError,
    atomic_json,
    atomic_write,
    disk_errors,
    naming,
    read_json,
    sync_file,
)
from dino.settings import Range, parsed
from dino.weights.checkpoint import last_step
from dino.weights.load import load_strictly

FORMAT = 1


@dataclass
class RunState:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: steps done.
        refused: steps that were not finite and therefore not taken.
        measured: the newest evaluation of the teacher, in percent.
        best: the best evaluation so far; None before the first.
        start: what was measured before the first step of a run that starts from weights.
        timed: of a run whose duration is a time: that time and what is spent of it (budget and
            seconds), its last step (end), and total and position of its schedules.
    """

    step: Annotated[int, Range(low=0)]
    refused: Annotated[int, Range(low=0)] = 0
    measured: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    start: float | None = None
    timed: Annotated[dict[str, float], Range(low=0)] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `RUN/checkpoints`.
        keep: how many of the newest stay.
    """

    folder: Path
    keep: int = 2

    def last(self) -> Path | None:
        """The newest complete checkpoint, or None; raises `UserError` as `last_step` does."""
        return last_step(self.folder)

    def save(self, distillation: Distillation, state: RunState) -> Path:
        """Save everything that evolves.

        Args:
            distillation: its student, teacher, center and optimizer.
            state: of the run after `state.step` steps.

        Raises:
            UserError: if the disk is full or refuses; the last checkpoint is then untouched.
        """
        final = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            with disk_errors(), naming(final):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                for name, tensors in _tensors(distillation).items():
                    save_file(tensors, temporary / f"{name}.safetensors")
                    sync_file(temporary / f"{name}.safetensors")
                atomic_json(temporary / "state.json", {"format": FORMAT, **asdict(state)})
                if final.exists():  # the same step again, after LAST was set back by hand
                    shutil.rmtree(final)
                temporary.rename(final)
                atomic_write(self.folder / "LAST", final.name + "\n")
        except UserError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.last()
            earlier = f"{last.name} is complete" if last else "no earlier one exists"
            raise UserError(f"{error}; no checkpoint was saved, {earlier}") from error
        self._prune(final)
        return final

    def restore(self, distillation: Distillation, path: Path) -> RunState:
        """Put a checkpoint into `distillation`; returns the state of the run.

        Raises:
            UserError: if a file is damaged or does not fit.
        """
        content = read_json(path / "state.json")
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"{path} has checkpoint format {found}, not {FORMAT}")
        state = parsed(RunState, content, path / "state.json")
        try:
            files = {
                name: load_file(path / f"{name}.safetensors")
                for name in ("student", "teacher", "loss", "optimizer")
            }
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}): write the name of an older folder into LAST"
            ) from None
        for name, module in distillation.stored().items():
            load_strictly(module, files[name], path / f"{name}.safetensors")
        _restore_optimizer(distillation, files["optimizer"], path / "optimizer.safetensors")
        return state

    def _prune(self, newest: Path) -> None:
        others = sorted(path for path in self.folder.glob("step_*") if path != newest)
        for path in others[: max(0, len(others) - (self.keep - 1))]:
            shutil.rmtree(path)


def _tensors(distillation: Distillation) -> dict[str, dict[str, Tensor]]:
    states = {name: module.state_dict() for name, module in distillation.stored().items()}
    states["optimizer"] = _optimizer_state(distillation)
    return {
        file: {name: tensor.detach().contiguous() for name, tensor in state.items()}
        for file, state in states.items()
    }


def _optimizer_state(distillation: Distillation) -> dict[str, Tensor]:
    """The optimizer's moments as "parameter|moment" (a frozen parameter has none)."""
    names: dict[Tensor, str] = {p: name for name, p in distillation.student.named_parameters()}
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, moments in distillation.optimizer.state.items()
        for key, value in moments.items()
        if value is not None
    }


def _restore_optimizer(distillation: Distillation, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = dict(distillation.student.named_parameters())
    unknown = sorted(
        key for key in tensors if key.count("|") != 1 or key.split("|")[0] not in parameters
    )
    if unknown:
        raise UserError(f"{path} holds moments of no parameter: {unknown[:3]}")
    distillation.optimizer.state.clear()
    for key, tensor in tensors.items():
        name, moment = key.split("|")
        parameter = parameters[name]
        distillation.optimizer.state[parameter][moment] = tensor.to(parameter.device)
