"""Checkpoints: whole or absent, strict, and without a pickle."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.small import assert_same, distillation, groups, schedules, state

from dino.files import UserError
from dino.train import checkpoint as module
from dino.train.checkpoint import Checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("at", [1, 3])
def test_restored_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, at: int) -> None:
    """Also inside the freeze, when the last layer has no moments yet."""
    planned = schedules(freeze_steps=2)
    options: dict[str, Any] = {"planned": planned, "optimizer": optimizer, "drop_path": 0.2}
    straight = distillation(**options)
    for step in range(6):
        straight.step(groups(step), step)
    first = distillation(**options)
    for step in range(at):
        first.step(groups(step), step)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(first, at, {"refused": 7})
    second = distillation(seed=99, **options)
    second.seed = first.seed
    last = checkpoints.last()
    assert last is not None
    assert checkpoints.restore(second, last) == {"format": 1, "step": at, "refused": 7}
    assert_same(state(second), state(first))
    for step in range(at, 6):
        second.step(groups(step), step)
    assert_same(state(second), state(straight))


def test_only_plain_files_are_written(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(distillation(), 3, {})
    assert sorted(p.name for p in path.iterdir()) == [
        "loss.safetensors",
        "optimizer.safetensors",
        "state.json",
        "student.safetensors",
        "teacher.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LAST", "step_00000003"]


def test_old_ones_go_and_leftovers_of_a_crash_too(tmp_path: Path) -> None:
    checkpoints, ours = Checkpoints(tmp_path, keep=2), distillation()
    (tmp_path / ".step_00000001.tmp").mkdir()
    for step in (1, 2, 3, 10):
        checkpoints.save(ours, step, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LAST", "step_00000003", "step_00000010"]
    assert checkpoints.last() == tmp_path / "step_00000010"
    checkpoints.save(ours, 2, {})  # LAST was set back by hand: the newest written wins
    assert checkpoints.last() == tmp_path / "step_00000002"


@pytest.mark.parametrize("name", ["student", "optimizer", "state.json", "LAST", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoints, ours = Checkpoints(tmp_path), distillation()
    checkpoints.save(ours, 1, {})
    before = {p: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if name in ("student", "optimizer"):
        write = module.save_file

        def save_file(tensors: Any, path: Path, **options: Any) -> None:
            full() if path.stem == name else write(tensors, path, **options)

        monkeypatch.setattr(module, "save_file", save_file)
    elif name == "state.json":
        monkeypatch.setattr(Path, "write_text", full)
    elif name == "LAST":
        monkeypatch.setattr(module, "atomic_write", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=r"no space is left on the disk; step_00000001 is whole"):
        checkpoints.save(ours, 2, {})
    monkeypatch.undo()
    assert checkpoints.last() == tmp_path / "step_00000001"
    assert {p: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    checkpoints.save(ours, 2, {})
    assert checkpoints.last() == tmp_path / "step_00000002"


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(distillation(), 1, {})
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)

    (path / "teacher.safetensors").write_bytes((path / "teacher.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(distillation(), path)

    other = distillation(head={"hidden": 16})
    with pytest.raises(
        UserError, match=r"do not fit the network: other shapes: head\.mlp\.0\.bias is"
    ):
        checkpoints.restore(other, whole)

    text = json.loads((whole / "state.json").read_text())
    (whole / "state.json").write_text(json.dumps({**text, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoints.restore(distillation(), whole)

    (tmp_path / "LAST").write_text("step_00000077\n")
    with pytest.raises(UserError, match="step_00000077, which is not there"):
        checkpoints.last()


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").last() is None
