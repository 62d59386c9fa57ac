"""Checkpoints: complete or absent, strict, and without a pickle."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small import assert_same, distillation, groups, schedules, state
from safetensors.torch import save_file

from dino.files import UserError
from dino.train import checkpoint as module
from dino.train.checkpoint import Checkpoints, RunState


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
    saved = RunState(at, refused=7, measured={"k10": 1.5}, best=2.5)
    checkpoints.save(first, saved)
    second = distillation(seed=99, **options)
    second.seed = first.seed
    last = checkpoints.last()
    assert last is not None
    assert checkpoints.restore(second, last) == saved
    assert_same(state(second), state(first))
    for step in range(at, 6):
        second.step(groups(step), step)
    assert_same(state(second), state(straight))


def test_only_plain_files_are_written(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(distillation(), RunState(3))
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
        checkpoints.save(ours, RunState(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LAST", "step_00000003", "step_00000010"]
    assert checkpoints.last() == tmp_path / "step_00000010"
    checkpoints.save(ours, RunState(2))  # LAST was set back by hand: the newest written wins
    assert checkpoints.last() == tmp_path / "step_00000002"


@pytest.mark.parametrize("name", ["student", "optimizer", "state.json", "LAST", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoints, ours = Checkpoints(tmp_path), distillation()
    checkpoints.save(ours, RunState(1))
    before = {p: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if name in ("student", "optimizer"):
        write = module.save_file

        def save_file(tensors: Any, path: Path, **options: Any) -> None:
            full() if path.stem == name else write(tensors, path, **options)

        monkeypatch.setattr(module, "save_file", save_file)
    elif name == "state.json":
        monkeypatch.setattr(module, "atomic_json", full)
    elif name == "LAST":
        monkeypatch.setattr(module, "atomic_write", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=r"No space left .* saved, step_00000001 is complete"):
        checkpoints.save(ours, RunState(2))
    monkeypatch.undo()
    assert checkpoints.last() == tmp_path / "step_00000001"
    assert {p: p.read_bytes() for p in (tmp_path / "step_00000001").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    checkpoints.save(ours, RunState(2))
    assert checkpoints.last() == tmp_path / "step_00000002"


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(distillation(), RunState(1))
    intact = tmp_path / "intact"
    shutil.copytree(path, intact)

    (path / "teacher.safetensors").write_bytes((path / "teacher.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(distillation(), path)

    other = distillation(head={"hidden": 16})
    with pytest.raises(
        UserError, match=r"do not fit the network: other shapes: head\.mlp\.0\.bias is"
    ):
        checkpoints.restore(other, intact)

    text = json.loads((intact / "state.json").read_text())
    (intact / "state.json").write_text(json.dumps({**text, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoints.restore(distillation(), intact)


@pytest.mark.parametrize(
    "name", ["step_00000077", "{other}", "../other", ".", "", "step_00000001/../../other", "\xff"]
)
def test_last_names_nothing_but_a_checkpoint_beside_it(tmp_path: Path, name: str) -> None:
    other = Checkpoints(tmp_path / "other").save(distillation(), RunState(1))
    other.rename(tmp_path / "other" / "x")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(distillation(), RunState(1))
    content = name.format(other=tmp_path / "other" / "x")
    (tmp_path / "run" / "LAST").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"LAST holds .*: write step_00000001 into it"):
        checkpoints.last()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"\xff",
        b"{",
        b'{"format": 1}',
        b'{"format": 1, "step": "x"}',
        b'{"format": 1, "step": -1}',
        b'{"format": 1, "step": 1, "measured": []}',
        b'{"format": 1, "step": 1, "measured": {"k10": "x"}}',
        b'{"format": 1, "step": 1, "best": []}',
        b'{"format": 1, "step": 1, "refused": null}',
        b'{"format": 1, "step": 1, "other": 2}',
    ],
)
def test_other_content_of_state_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = Checkpoints(tmp_path).save(distillation(), RunState(1))
    (path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        Checkpoints(tmp_path).restore(distillation(), path)


def without_checksums(path: Path) -> Path:
    """A checkpoint as earlier versions wrote it."""
    content = json.loads((path / "state.json").read_text())
    del content["sha256"]
    (path / "state.json").write_text(json.dumps({**content, "format": 1}))
    return path


def test_the_first_format_is_read(tmp_path: Path) -> None:
    """It had no checksums."""
    checkpoints, ours = Checkpoints(tmp_path), distillation()
    path = without_checksums(checkpoints.save(ours, saved := RunState(3, measured={"k10": 1.5})))
    assert checkpoints.newest() == (path, [])
    other = distillation(seed=1)
    assert checkpoints.restore(other, path) == saved
    assert_same(state(other), state(ours))


def flip(data: bytes) -> bytes:
    middle = len(data) - 9
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a flipped bit": flip,
    "zeros": lambda data: data[:-64] + bytes(64),
    "cut": lambda data: data[:-9],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: str
) -> None:
    checkpoints, ours = Checkpoints(tmp_path, keep=3), distillation()
    first = checkpoints.save(ours, RunState(1))
    for step in range(2):
        ours.step(groups(step), step)  # so that there are moments
    second = checkpoints.save(ours, RunState(2))
    for name in ("student", "teacher", "loss", "optimizer"):
        file = second / f"{name}.safetensors"
        before = file.read_bytes()
        changed = DAMAGES[damage](before)
        file.unlink() if changed is None else file.write_bytes(changed)
        path, (sentence,) = checkpoints.newest()
        assert path == first
        assert str(file) in sentence
        assert "the run goes on from step_00000001" in sentence
        with pytest.raises(UserError, match=str(file)):
            checkpoints.restore(distillation(), second)
        file.write_bytes(before)
    assert checkpoints.newest() == (second, [])
    shutil.rmtree(first)
    (second / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match="is missing, and there is no earlier checkpoint: restore"):
        checkpoints.newest()


def test_a_changed_number_of_state_json_is_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(distillation(), RunState(1))
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 1', '"step": 3'))
    with pytest.raises(UserError, match=r"state.json is damaged \(its SHA-256 is another\)"):
        checkpoints.restore(distillation(), path)


def test_going_on_from_an_earlier_one_keeps_it_until_there_are_others(tmp_path: Path) -> None:
    checkpoints, ours = Checkpoints(tmp_path, keep=2), distillation()
    for step in (4, 6, 8):
        checkpoints.save(ours, RunState(step))
    (tmp_path / "LAST").write_text("step_00000006")
    checkpoints.save(ours, RunState(7))
    names = {path.name for path in tmp_path.glob("step_*")}
    assert names == {"step_00000006", "step_00000007", "step_00000008"}


def test_milestones_stay(tmp_path: Path) -> None:
    checkpoints, ours = Checkpoints(tmp_path, keep=1, keep_every=4), distillation()
    for step in (2, 4, 6, 8, 9, 10):
        checkpoints.save(ours, RunState(step))
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == ["step_00000004", "step_00000008", "step_00000010"]


def test_a_copy_does_not_change_with_the_training(tmp_path: Path) -> None:
    """So that it can be written while the training goes on."""
    ours = distillation()
    ours.step(groups(0), 0)
    before, copied = state(ours), module.tensors_of(ours, copied=True)
    ours.step(groups(1), 1)
    Checkpoints(tmp_path).write(copied, RunState(1))
    other = distillation(seed=1)
    Checkpoints(tmp_path).restore(other, tmp_path / "step_00000001")
    assert_same(state(other), before)


def test_moments_of_unknown_parameters_are_refused(tmp_path: Path) -> None:
    path = without_checksums(Checkpoints(tmp_path).save(distillation(), RunState(1)))
    for name in ("unknown|exp_avg", "head.mlp.0.bias"):
        save_file({name: torch.zeros(1)}, path / "optimizer.safetensors")
        with pytest.raises(UserError, match=r"optimizer.safetensors holds moments of no parameter"):
            Checkpoints(tmp_path).restore(distillation(), path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").last() is None
