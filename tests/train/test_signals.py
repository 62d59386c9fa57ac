"""Signals: the first saves, Ctrl-C after it stops at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run as run_ranks
from helpers.small import TINY_RUN, images

from dino import cli
from dino.distillation.step import Distillation
from dino.runtime import Ranks
from dino.train.config import PretrainConfig
from dino.train.loop import train
from dino.train.recipes import demo
from dino.train.signals import NAMES, stop_on_signals

if os.name == "nt":
    pytest.skip("Windows has none of these signals", allow_module_level=True)

SIGNALS = [getattr(signal, name) for name in NAMES]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Heed signals that the tests were started without: nohup and `&` ignore them, also inside."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


def config(**changes: Any) -> PretrainConfig:
    settings = {"run.duration": "9 steps", "execution.checkpoint_every": "0 steps", **changes}
    return demo().changed({**TINY_RUN, **settings})


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send signals to this process in the middle of a training step."""
    original = Distillation.step

    def interrupted(self: Distillation, groups: Any, number: int, *progress: Any) -> Any:
        if number == step:
            send(*numbers)
        return original(self, groups, number, *progress)

    monkeypatch.setattr(Distillation, "step", interrupted)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_saves_and_stops(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    signal_at(monkeypatch, 3, number)
    before = [signal.getsignal(other) for other in SIGNALS]
    result = train(config(), images(), tmp_path, device=torch.device("cpu"))
    assert (result.step, result.finished) == (4, False)
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == "step_00000004"
    message = f"{signal.Signals(number).name}: the run saves after this step and stops; Ctrl-C"
    assert message in capfd.readouterr().err
    assert [signal.getsignal(other) for other in SIGNALS] == before


@pytest.mark.usefixtures("unchecked")  # tyro passes its MISSING in place of a string
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_stops_at_once(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, 3, first, signal.SIGINT)
    settings = {**TINY_RUN, "run.duration": "9 steps", "execution.checkpoint_every": "0 steps"}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    arguments = ["pretrain", "demo", "--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, *(flag.replace("_", "-") for flag in flags)])
    assert caught.value.code == 130
    assert not list(tmp_path.glob("run/checkpoints/step_*"))


def test_other_signals_do_not_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals(Ranks()) as stop:
        send(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
        assert stop.is_set()
    assert capfd.readouterr().err.strip().count("\n") == 0


def test_forked_workers_ignore_signals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals(Ranks()) as stop:
        monkeypatch.setattr(os, "getpid", lambda: 0)  # as in a worker, which inherits the handlers
        send(signal.SIGINT, signal.SIGINT)
        assert not stop.is_set()
    assert not capfd.readouterr().err


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals(Ranks()) as stop:
            send(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def trained_rank(ranks: Ranks, run: Path) -> tuple[int, bool]:
    """Train with a signal to the second rank only, in its fourth step."""
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            signal_at(patch, 3, signal.SIGUSR1)
        result = train(config(), images(), run, device=torch.device("cpu"))
    return result.step, result.finished


def test_a_signal_to_one_rank_stops_and_saves_all_at_one_step(tmp_path: Path) -> None:
    assert run_ranks(trained_rank, 2, tmp_path, joined=False) == [(4, False)] * 2
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == "step_00000004"


def test_only_the_main_rank_prints(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals(Ranks(1, 2)) as stop:
        send(signal.SIGTERM)
        assert stop.is_set()
    assert not capfd.readouterr().err


CLOSED_TERMINAL = """
import sys
from dino.runtime import Ranks
from dino.train.signals import stop_on_signals
with stop_on_signals(Ranks()) as stop:
    print("ready", flush=True)
    stop.wait(60)
    print("a later message", file=sys.stderr, flush=True)
    with open(sys.argv[1], "w") as file:
        file.write("saved")
"""


def test_a_closed_terminal_saves_too(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    words = [sys.executable, "-c", CLOSED_TERMINAL, str(tmp_path / "state")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=terminal, stderr=terminal, stdout=pipe) as child:
        os.close(terminal)
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"ready\n"
            os.close(ours)
            child.send_signal(signal.SIGHUP)
            assert child.wait(timeout=60) == 0
        finally:
            child.kill()
    assert (tmp_path / "state").read_text() == "saved"
