"""`dino report --watch`: when it writes, what it costs, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dino import cli
from dino.show.report import watch as watching
from dino.show.report.watch import locked, watch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"total_steps": 30}))
    return folder


class Clock:
    """Time that passes only while the watch sleeps or writes; things happen at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.events: dict[float, Callable[[], object]] = {}
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watching.time, "sleep", self.pass_)

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        for moment in sorted(self.events):
            if moment <= self.now:
                self.events.pop(moment)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def log(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 2.0}) + "\n")


def test_it_writes_when_there_is_news_and_ends_with_the_run(run: Path, clock: Clock) -> None:
    written: list[tuple[float, int]] = []

    def write() -> Path:
        lines = (run / "metrics.jsonl").read_text().count("\n") if written else 0
        written.append((clock.now, lines))
        return run / "report.html"

    clock.events = {moment: lambda: log(run, 10) for moment in (3.0, 11.0)}
    clock.events[21.0] = lambda: log(run, 30)
    assert watch([run], write)
    assert [lines for _, lines in written] == [0, 1, 2]  # then comes the complete page
    assert all(
        moment - event <= 2 * watching.EVERY
        for (moment, _), event in zip(written[1:], (3.0, 11.0), strict=True)
    )
    assert clock.now < 21 + 3 * watching.EVERY  # no lock is held, and the last step is done


def test_pages_take_a_hundredth_of_the_time(run: Path, clock: Clock) -> None:
    written = 0

    def write() -> Path:
        nonlocal written
        written += 1
        clock.now += 3.0
        return run / "report.html"

    clock.events = {float(moment): lambda: log(run, 10) for moment in range(1, 3000)}
    clock.events[3000.0] = lambda: log(run, 30)
    assert watch([run], write)
    assert 9 <= written <= 12
    assert 3.0 * (written - 1) <= 1.1 * watching.SHARE * clock.now


def test_a_run_that_has_stopped_ends_the_watch(
    run: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    log(run, 10)
    assert watch([run], lambda: run / "report.html")
    assert watching.QUIET <= clock.now < watching.QUIET + 3 * watching.EVERY
    assert f"{run} has stopped at step 10" in capsys.readouterr().err


@pytest.mark.parametrize("held", [True, None])
def test_a_run_whose_process_may_live_is_waited_for(
    held: bool | None, run: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(run, 10)
    answers = {True: held, False: False}
    monkeypatch.setattr(watching, "locked", lambda _: answers[clock.now < 5000])
    assert watch([run], lambda: run / "report.html")
    assert 5000 <= clock.now < 5000 + 3 * watching.EVERY


def test_without_locks_it_ends_after_a_day(
    run: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(run, 10)
    monkeypatch.setattr(watching, "locked", lambda _: None)
    monkeypatch.setattr(watching, "EVERY", 600.0)
    assert watch([run], lambda: run / "report.html")
    assert watching.LONGEST <= clock.now < watching.LONGEST + 1200


def test_ctrl_c_ends_it_and_the_page_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    log(run, 10)
    monkeypatch.setattr(watching.time, "sleep", interrupted)
    cli.main(["report", str(run), "--watch"])
    printed = capsys.readouterr()
    assert printed.out == f"{run / 'report.html'}\n"
    assert f"watching {run / 'report.html'}: Ctrl-C ends this" in printed.err
    assert '<meta name="reload" content="15">' in (run / "report.html").read_text()


def test_at_the_end_the_page_is_complete(
    run: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    log(run, 30)
    cli.main(["report", str(run), "--watch"])
    text = (run / "report.html").read_text()
    assert 'name="reload"' not in text
    assert "are drawn at the end" not in text


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+b")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_the_lock_of_another_process_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert locked(path) is False
    path.touch()
    assert locked(path) is False
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        assert locked(path) is True
        process.communicate(timeout=60)
    assert locked(path) is False
