"""Checkpoints: plain files, no pickle, and always one that is complete.

    checkpoints/step_00001200/   student, teacher, optimizer, loss (.safetensors), state.json
    checkpoints/LAST             the name of the newest complete checkpoint

A checkpoint is written into a hidden sibling folder, flushed, and renamed; then LAST is replaced.
A process that dies at any moment leaves LAST naming a complete checkpoint; what it left half
written is removed by the next run in the folder (`RunFolder.locked`). `state.json` holds a SHA-256
of every other file, so that a damaged checkpoint is not resumed: the one before it is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino.distillation.step import Distillation
from dino.files import (
    UserError,
    atomic_json,
    atomic_write,
    disk_errors,
    finite_json,
    naming,
    read_json,
    sync_file,
)
from dino.settings import Range, parsed
from dino.weights.checkpoint import last_step
from dino.weights.files import file_hash
from dino.weights.load import load_strictly

FORMAT = 2
"""1 had no checksums."""
FILES = ("student", "teacher", "loss", "optimizer")
"""Of tensors, in a checkpoint."""


Module = TypeVar("Module", bound=nn.Module)


class Damaged(UserError):
    """A checkpoint that cannot be read, or does not hold what was written."""


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
        keep_every: those of multiples of so many steps stay as well; 0 for none.
    """

    folder: Path
    keep: int = 2
    keep_every: int = 0

    def last(self) -> Path | None:
        """The newest complete checkpoint, or None; raises `UserError` as `last_step` does."""
        return last_step(self.folder)

    def save(self, distillation: Distillation, state: RunState) -> Path:
        """Save everything that evolves, as `write` does."""
        return self.write(tensors_of(distillation), state)

    def write(self, tensors: dict[str, dict[str, Tensor]], state: RunState) -> Path:
        """Save what `tensors_of` gave, of the run after `state.step` steps.

        Raises:
            UserError: if the disk is full or refuses; the last checkpoint is then untouched.
        """
        final = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            with disk_errors(), naming(final):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                for name, named in tensors.items():
                    save_file(named, temporary / f"{name}.safetensors")
                    sync_file(temporary / f"{name}.safetensors")
                hashes = {name: file_hash(temporary / f"{name}.safetensors") for name in FILES}
                hashes["state"] = _digest(content := finite_json(asdict(state)))
                content = {"format": FORMAT, **content, "sha256": hashes}
                atomic_json(temporary / "state.json", content)
                if final.exists():  # the same step again, after LAST was set back
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

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is undamaged, or None, and a sentence for each damaged one.

        Only LAST and earlier ones are looked at.

        Raises:
            UserError: as `last` does, or if all are damaged.
        """
        damages: list[str] = []
        last = self.last()
        if last is None:
            return None, []
        earlier = sorted(
            (p for p in self.folder.glob("step_*") if p.name < last.name), reverse=True
        )
        for path in (last, *earlier):
            try:
                _read_state(path)
                return path, [f"{damage}: the run goes on from {path.name}" for damage in damages]
            except Damaged as error:
                damages.append(str(error))
        raise UserError(
            f"{damages[0]}, and there is no earlier checkpoint: restore it from a copy, or choose "
            "another --out"
        )

    def restore(self, distillation: Distillation, path: Path) -> RunState:
        """Put a checkpoint into `distillation`; returns the state of the run.

        Raises:
            UserError: if a file is damaged or does not fit.
        """
        state = _read_state(path)
        try:
            files = {name: load_file(path / f"{name}.safetensors") for name in FILES}
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path} is damaged ({error})") from None
        for name, module in distillation.stored().items():
            load_strictly(module, files[name], path / f"{name}.safetensors")
        _restore_optimizer(distillation, files["optimizer"], path / "optimizer.safetensors")
        return state

    def _prune(self, newest: Path) -> None:
        """Remove the earliest; later ones, after LAST was set back, stay until they come again."""
        earlier = sorted(p for p in self.folder.glob("step_*") if p.name < newest.name)
        for path in earlier[: max(0, len(earlier) - (self.keep - 1))]:
            digits = path.name.removeprefix("step_")
            kept = self.keep_every and digits.isdecimal() and int(digits) % self.keep_every == 0
            if not kept:
                shutil.rmtree(path)


def _read_state(path: Path) -> RunState:
    """The state of a checkpoint whose files are those that were written.

    Raises:
        Damaged: naming the file.
        UserError: for the format of a newer version.
    """
    try:
        content = read_json(path / "state.json")
    except UserError as error:
        raise Damaged(str(error)) from None
    if not isinstance(content, dict):
        raise Damaged(f"{path / 'state.json'} is damaged (it holds no object)")
    found, hashes = content.pop("format", None), content.pop("sha256", {})
    if isinstance(found, int) and found > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {found}, and this version reads up to {FORMAT}: update "
            "dino-ssl"
        )
    if found not in (1, FORMAT) or not isinstance(hashes, dict):
        raise Damaged(f"{path / 'state.json'} is damaged (format {found!r})")
    try:
        state = parsed(RunState, content, path / "state.json")
    except UserError as error:
        raise Damaged(str(error)) from None
    if found == FORMAT and _digest(content) != hashes.get("state"):
        raise Damaged(f"{path / 'state.json'} is damaged (its SHA-256 is another)")
    for name in FILES:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if found == FORMAT and file_hash(file) != hashes.get(name):
            raise Damaged(f"{file} is damaged (its SHA-256 is not that of state.json)")
    return state


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensors_of(distillation: Distillation, *, copied: bool = False) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file and name; `copied` to new memory of the CPU."""
    states = {name: module.state_dict() for name, module in distillation.stored().items()}
    states["optimizer"] = _optimizer_state(distillation)
    return {
        file: {
            name: (tensor.detach().to("cpu", copy=True) if copied else tensor.detach()).contiguous()
            for name, tensor in state.items()
        }
        for file, state in states.items()
    }


def with_tensors(module: Module, tensors: dict[str, Tensor]) -> Module:
    """A copy of a module whose state is `tensors`, of which no further copy is made."""
    memo: dict[int, Any] = {id(b): tensors[n] for n, b in module.named_buffers() if n in tensors}
    for name, parameter in module.named_parameters():
        memo[id(parameter)] = nn.Parameter(tensors[name], requires_grad=False)
    return copy.deepcopy(module, memo)


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
        if tensor.shape == parameter.shape:  # in the layout that the optimizer gives it
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        else:
            value = tensor.to(parameter.device, copy=True)
        distillation.optimizer.state[parameter][moment] = value
