"""The launcher's environment, the process group and the number of cores."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run

from dino import cgroups, cli, rendezvous, runtime
from dino.files import UserError
from dino.runtime import Ranks, barrier, gather_objects, process_group, ranks

CPU = torch.device("cpu")
LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def launch(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_ranks_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() == Ranks(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks() == Ranks(0, 1, 0, 1)
    launch(monkeypatch, LOCAL_WORLD_SIZE=None)
    assert ranks() == Ranks(1, 2, 1, 1)
    launch(monkeypatch)
    assert ranks() == Ranks(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"WORLD_SIZE": None}, "RANK is set without WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": None}, "RANK is set without WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE=2 needs RANK as well"),
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2 processes"),
        ({"RANK": "-1"}, "RANK=-1 is not one"),
        ({"WORLD_SIZE": "0"}, "is not one of WORLD_SIZE=0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no integer"),
        ({"RANK": ""}, "RANK= is no integer"),
        ({"LOCAL_RANK": None}, "needs LOCAL_RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE=all is no integer"),
        ({"MASTER_ADDR": None}, "needs MASTER_ADDR"),
        ({"MASTER_PORT": None}, "needs MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no integer"),
    ],
)
def test_an_incomplete_launcher_is_refused(
    changes: dict[str, str | None], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, **changes)
    with pytest.raises(UserError, match=f"{problem}.*torchrun"):
        ranks()


@pytest.mark.usefixtures("unchecked")  # tyro passes its MISSING in place of a string
@pytest.mark.parametrize("launcher", [{"RANK": "1"}, {"WORLD_SIZE": "1", "RANK": "one"}])
def test_a_command_with_an_incomplete_launcher_ends_in_one_sentence(
    launcher: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "demo", "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- one group
def two_programs(_: Ranks) -> list[Any]:
    """The group of two programs, one after the other, and between and after them."""
    groups, answers = [], []
    for _program in range(2):
        with process_group(CPU) as here, process_group(CPU) as again:
            assert here == again
            answers.append(gather_objects(here.rank))
            groups.append(dist.group.WORLD)
        groups.append(dist.group.WORLD)
    assert groups[0] is not None
    assert all(group is groups[0] for group in groups)
    return answers


def test_programs_in_one_launch_share_one_group() -> None:
    assert run(two_programs, 2, joined=False) == [[[0, 1], [0, 1]]] * 2


def leave_early(here: Ranks) -> str:
    if here.rank == 1:
        return ""
    with pytest.raises(UserError) as caught, process_group(CPU):
        barrier()
    return str(caught.value)


def test_a_process_that_ended_is_reported_in_one_sentence() -> None:
    message, _ = run(leave_early, 2)
    assert "another process of this job ended, or did not answer within 5 minutes" in message
    assert "DINO_TIMEOUT" in message


def test_other_errors_pass_through_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), process_group(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(UserError, match="--device cuda"), process_group(CPU):
        pass


# ---------------------------------------------------------------------------------- limits
def test_every_wait_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    found: list[Any] = []
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: found.append(timeout))
    monkeypatch.setattr(rendezvous, "meet", lambda rank, world, seconds: found.append(seconds))
    monkeypatch.setattr(runtime, "Finalize", lambda _, leave, exitpriority: found.append(leave))
    for value in (None, "2.5"):
        if value is not None:
            monkeypatch.setenv("DINO_TIMEOUT", value)
        with process_group(CPU):
            pass
    limits = [(30 * 60, timedelta(minutes=30)), (150, timedelta(minutes=2.5))]
    assert found == [each for limit in limits for each in (*limit, runtime._leave)]
    for wrong in ("0", "-1", "nan", "inf", "soon", "1e9"):
        monkeypatch.setenv("DINO_TIMEOUT", wrong)
        with pytest.raises(UserError, match="DINO_TIMEOUT must be minutes"), process_group(CPU):
            pass


@pytest.mark.parametrize("case", ["no server", "a port in use", "no other process"])
def test_processes_that_do_not_meet_end_in_one_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_TIMEOUT", "0.02")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = str(taken.getsockname()[1])
        if case == "no server":
            launch(monkeypatch, MASTER_PORT=port)
        elif case == "a port in use":
            taken.listen()
            launch(monkeypatch, RANK="0", LOCAL_RANK="0", MASTER_PORT=port)
        else:
            launch(monkeypatch, RANK="0", LOCAL_RANK="0", MASTER_PORT="0")
        sentence = r"did not meet at 127\.0\.0\.1:.*DINO_TIMEOUT"
        with pytest.raises(UserError, match=sentence) as caught, process_group(CPU):
            pass
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


# ---------------------------------------------------------------------------------- cores
def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in ((None, 8), (3, 3), (64, 8)):
        monkeypatch.setattr(cgroups, "cpu_quota", lambda quota=quota: quota)
        assert runtime.cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runtime.cores() == 64


def test_cores_that_others_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(runtime, "CPU_TIMES", tmp_path / "stat")
    times = (tmp_path / "stat").write_text
    #     user nice system idle iowait irq softirq steal guest
    times("cpu 9\ncpu0 10 0 0 90 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 50 0 0 0 50 0 0 0 0\n")
    later = "cpu 9\ncpu0 30 5 0 165 0 0 0 0 0\ncpu1 9 9 9 0 0 0 0 0 0\ncpu2 125 0 0 0 75 0 0 0 0\n"
    monkeypatch.setattr(runtime.time, "sleep", lambda _: times(later))
    assert runtime.busy_cores() == pytest.approx(0.25 + 0.75)
    monkeypatch.setattr(runtime, "CPU_TIMES", tmp_path / "none")
    assert runtime.busy_cores() == 0


@pytest.mark.parametrize(("cores", "local", "workers"), [(8, 1, 7), (128, 2, 16), (2, 2, 1)])
def test_workers_share_the_cores_of_the_host(
    cores: int, local: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "cores", lambda: cores)
    launch(monkeypatch, LOCAL_WORLD_SIZE=str(local))
    assert runtime.default_workers() == workers
