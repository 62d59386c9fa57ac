"""Processes that meet, or not: a mistake or the death of one ends the others, soon and in words."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino import rendezvous
from dino.files import UserError
from dino.runtime import gather_objects, process_group, ranks, same_errors

LIMIT = 300
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _one(function: Callable[..., None], rank: int, port: int, log: Path, *rest: Any) -> None:
    """A process with the variables of a launcher that does not watch it."""
    launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "DINO_TIMEOUT": 4}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    rendezvous.BEAT, rendezvous.SILENCE = 0.1, 2.0
    try:
        function(rank, *rest)
    except UserError as error:
        print(f"dino: {error}", file=sys.stderr, flush=True)
        rendezvous.report_failure(str(error))
        os._exit(2)
    except RuntimeError as error:  # as Python ends a program
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)


def ends(
    function: Callable[..., None], folder: Path, *rest: Any, waits: int = 2
) -> list[tuple[int | None, str]]:
    """Exit status and messages of two processes, of which the first `waits` end by themselves."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["dino.pretraining"])
    logs = [folder / f"{rank}.log" for rank in range(2)]
    started = [
        context.Process(target=_one, args=(function, rank, port, logs[rank], *rest))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    try:
        for process in started[:waits]:
            process.join(LIMIT)
            assert process.exitcode is not None, "it hangs"
    finally:
        for process in started:
            process.kill()
            process.join(60)
    return [(p.exitcode, log.read_text().strip()) for p, log in zip(started, logs, strict=True)]


def mistake_before(rank: int, mistaken: int) -> None:
    if rank == mistaken:
        raise UserError("--data x does not exist")
    with process_group(CPU):
        gather_objects(rank)


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_before_the_meeting_ends_the_other(tmp_path: Path, mistaken: int) -> None:
    found = ends(mistake_before, tmp_path, mistaken)
    sentence = f"dino: rank {mistaken} stopped: --data x does not exist"
    assert found[mistaken] == (2, "dino: --data x does not exist")
    assert found[1 - mistaken] == (2, sentence)


def error_after(rank: int, failing: int) -> None:
    with process_group(CPU):
        gather_objects(rank)
        if rank == failing:
            raise RuntimeError("broken")
        time.sleep(200)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_after_it_ends_the_other_that_works_for_long(tmp_path: Path, failing: int) -> None:
    """That one is in no collective operation, and would not notice."""
    found = ends(error_after, tmp_path, failing)
    assert found[failing][0] == 1
    assert "RuntimeError: broken" in found[failing][1]
    sentence = f"dino: rank {failing} stopped: RuntimeError: broken; this is rank {1 - failing},"
    assert found[1 - failing] == (2, f"{sentence} which stops too")


def stands_still(rank: int) -> None:
    rendezvous.NOTICE = 3.0  # rank 0 tells the other one in vain
    with process_group(CPU):
        gather_objects(rank)
        with rendezvous.doing(f"reading the images of step {rank}"):
            time.sleep(1)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(200)


def test_a_process_that_stands_still_is_named_with_what_it_did(tmp_path: Path) -> None:
    status, text = ends(stands_still, tmp_path, waits=1)[0]
    assert status == 2
    assert "rank 1 gave no sign of life for 2 s (it was reading the images of step 1)" in text


def mistake_of_one(rank: int) -> None:
    with process_group(CPU), same_errors():
        if rank == 1:
            Path("/nonexistent/file").read_bytes()


def test_a_mistake_of_one_is_that_of_all(tmp_path: Path) -> None:
    for status, text in ends(mistake_of_one, tmp_path):
        assert status == 2
        assert "rank 1: /nonexistent/file does not exist: check the name" in text


def one_ends_later(rank: int) -> None:
    with process_group(CPU):
        gather_objects(rank)
        time.sleep(4 * (rank == 0))


def test_a_process_may_end_before_the_others(tmp_path: Path) -> None:
    assert ends(one_ends_later, tmp_path) == [(0, ""), (0, "")]


# ---------------------------------------------------------------------------------- torchrun
def attempt(rank: int, number: int, port: int) -> None:
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(number),
        "MASTER_PORT": str(port),
    }
    with process_group(CPU):
        assert gather_objects((rank, number)) == [(0, number), (1, number)]
        if number == 0:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(200)
        gather_objects(rank)


def test_all_are_started_again_after_one_was_killed(tmp_path: Path) -> None:
    """The store of the launcher, with what it holds, is the same in all attempts."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (tmp_path / "first").mkdir()
    (first, text), second = ends(attempt, tmp_path / "first", 0, store.port)
    assert first == 2
    assert "rank 1 gave no sign of life for 2 s" in text  # torchrun ends it before
    assert second == (-signal.SIGKILL, "")
    assert ends(attempt, tmp_path, 1, store.port) == [(0, ""), (0, "")]


def test_ranks_stop_when_their_launcher_was_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped: list[tuple[int, int]] = []
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "BEAT", 0.01)
    monkeypatch.setattr(rendezvous, "connect", lambda *_, **__: None)
    monkeypatch.setattr(os, "kill", lambda *arguments: stopped.append(arguments))
    monkeypatch.setattr(rendezvous.Watch, "beat", lambda *_: None)
    parent = [4321]
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    watch = rendezvous.Watch(None, 0, 2)  # type: ignore[arg-type]
    watch.start()
    time.sleep(0.05)
    assert watch.is_alive()
    assert not stopped
    parent[0] = 1
    watch.join(60)
    sys.excepthook = watch._hook
    assert stopped == [(os.getpid(), signal.SIGTERM)]
    assert capfd.readouterr().err == "dino: torchrun has ended\n"


def test_a_single_process_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "connect", lambda *_: pytest.fail("it connects"))
    rendezvous.report_failure("a mistake")
    assert ranks().world == 1
