"""Checkpoints: plain files, no pickle, and always one that is whole.

    checkpoints/step_00001200/   student, teacher, optimizer, loss (.safetensors), state.json
    checkpoints/LAST             the name of the newest whole checkpoint

A checkpoint is written into a hidden sibling folder, flushed, and renamed; then LAST is swapped.
A process that dies at any moment leaves LAST pointing at a whole checkpoint; leftovers of the
death are removed by the next save.
"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino.distillation.step import Distillation
from dino.files import UserError, atomic_write, read_json, sync_file, sync_folder
from dino.weights.load import load_strictly

FORMAT = 1


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `RUN/checkpoints`.
        keep: how many of the newest are kept.
    """

    folder: Path
    keep: int = 2

    def last(self) -> Path | None:
        """The newest whole checkpoint, or None.

        Raises:
            UserError: if LAST names a checkpoint that is not there.
        """
        pointer = self.folder / "LAST"
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / "state.json").exists():
            raise UserError(
                f"{pointer} names {path.name}, which is not there: restore it, or write the name "
                "of another checkpoint folder into LAST"
            )
        return path

    def save(self, distillation: Distillation, step: int, state: dict[str, Any]) -> Path:
        """Save everything that evolves, after `step` steps.

        Args:
            distillation: its student, teacher, center and optimizer.
            step: steps done so far.
            state: JSON-able counters of the loop.

        Raises:
            UserError: if the disk is full or refuses; the last checkpoint is then untouched.
        """
        final, temporary = self.folder / f"step_{step:08d}", self.folder / f".step_{step:08d}.tmp"
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            for name, tensors in _tensors(distillation).items():
                save_file(tensors, temporary / f"{name}.safetensors")
                sync_file(temporary / f"{name}.safetensors")
            text = json.dumps({"format": FORMAT, "step": step, **state}, indent=2)
            (temporary / "state.json").write_text(text + "\n")
            sync_file(temporary / "state.json")
            sync_folder(temporary)
            if final.exists():  # the same step again, after LAST was set back by hand
                shutil.rmtree(final)
            temporary.rename(final)
            atomic_write(self.folder / "LAST", final.name + "\n")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(_disk_trouble(error, self.folder, self.last())) from error
        self._prune(final)
        return final

    def restore(self, distillation: Distillation, path: Path) -> dict[str, Any]:
        """Put a checkpoint into `distillation`; returns the loop's counters.

        Raises:
            UserError: if a file is damaged or does not fit.
        """
        state: dict[str, Any] = read_json(path / "state.json")
        if state.get("format") != FORMAT:
            raise UserError(f"{path} has checkpoint format {state.get('format')}, not {FORMAT}")
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
        _restore_optimizer(distillation, files["optimizer"])
        return state

    def _prune(self, newest: Path) -> None:
        others = sorted(path for path in self.folder.glob("step_*") if path != newest)
        for path in others[: max(0, len(others) - (self.keep - 1))]:
            shutil.rmtree(path)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(path)


def _tensors(distillation: Distillation) -> dict[str, dict[str, Tensor]]:
    return {
        **{name: _plain(part.state_dict()) for name, part in distillation.stored().items()},
        "optimizer": _plain(_optimizer_state(distillation)),
    }


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_state(distillation: Distillation) -> dict[str, Tensor]:
    """The optimizer's moments as "parameter|moment" (a frozen parameter has none)."""
    names: dict[Tensor, str] = {p: name for name, p in distillation.student.named_parameters()}
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, moments in distillation.optimizer.state.items()
        for key, value in moments.items()
        if value is not None
    }


def _restore_optimizer(distillation: Distillation, tensors: dict[str, Tensor]) -> None:
    parameters = dict(distillation.student.named_parameters())
    unknown = sorted({key.split("|")[0] for key in tensors} - parameters.keys())
    if unknown:
        raise UserError(f"the optimizer's file names parameters that do not exist: {unknown[:3]}")
    distillation.optimizer.state.clear()
    for key, tensor in tensors.items():
        name, moment = key.split("|")
        parameter = parameters[name]
        distillation.optimizer.state[parameter][moment] = tensor.to(parameter.device)


def _disk_trouble(error: Exception, folder: Path, last: Path | None) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "no space is left on the disk" if full else str(error)
    kept = f"{last.name} is whole" if last else "no earlier one exists"
    return f"could not save a checkpoint into {folder}: {reason}; {kept}, free some space and rerun"
