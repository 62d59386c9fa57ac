"""Ctrl-C and the signals of schedulers: the run saves before it stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dino.runtime import Ranks

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@contextmanager
def stop_on_signals(ranks: Ranks) -> Iterator[threading.Event]:
    """An event that `NAMES` set; the first signal prints a message, the next Ctrl-C interrupts.

    Signals that the process ignores (`nohup`) stay ignored. Of several ranks only the main one
    prints; they combine their events, so that all stop at the same step.

    Raises:
        KeyboardInterrupt: at Ctrl-C after any signal.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    process = os.getpid()

    def handle(number: int, _: Any) -> None:
        if os.getpid() != process:  # a forked worker, which ends with the run
            return
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        first = not stop.is_set()
        stop.set()
        if first and ranks.main:
            _print(
                f"{signal.Signals(number).name}: the run saves after this step and stops; "
                "Ctrl-C stops it at once, without saving"
            )

    before = {
        number: signal.signal(number, handle)
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name))
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: not set by Python
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(text: str) -> None:
    """Write to stderr from a signal handler, which must not use Python's buffers."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:  # the terminal was closed: without it, later messages must not fail the run
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
