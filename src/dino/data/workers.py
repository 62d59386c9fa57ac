"""Worker processes that die: PyTorch's riddle becomes a sentence that says what to do."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from dino.files import UserError

SIGNALLED = 1.0
"""Seconds within which the system's signal follows a death."""


def watched(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of a `DataLoader`, whose workers have been started.

    Raises:
        UserError: when a worker has died; where the system tells of it at once (signals), also
            while no batch is asked for.
    """
    _translate_signals()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if isinstance(error.__cause__, UserError):  # from our handler, through PyTorch's hands
                raise error.__cause__ from None
            if (sentence := _sentence(str(error))) is None:
                raise
            raise UserError(sentence) from error
        except (OSError, EOFError) as error:  # it died while it was handing over a batch
            time.sleep(SIGNALLED)  # our handler raises in here, and knows more
            raise UserError(_sentence("DataLoader worker exited unexpectedly")) from error
        yield batch


def _translate_signals() -> None:
    """Let PyTorch's handler for the end of a child raise our error instead of its own."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    theirs = signal.getsignal(signal.SIGCHLD)
    if not callable(theirs) or isinstance(theirs, _Handler):
        return
    signal.signal(signal.SIGCHLD, _Handler(theirs))


class _Handler:
    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.theirs(number, frame)
        except RuntimeError as error:
            if (sentence := _sentence(str(error))) is None:
                raise
            raise UserError(sentence) from error


def _sentence(said: str) -> str | None:
    """What PyTorch says of a dead worker in other words; None for anything else that it says."""
    if not said.startswith("DataLoader worker"):
        return None
    what = "a process that reads images"
    if code := re.search(r"with exit code (\d+)", said):
        return (
            f"{what} ended itself with exit code {code[1]}: start again with 0 workers to see why"
        )
    told = re.search(r"killed by signal: ([^.]+)", said)
    how = told[1] if told else "ended unexpectedly"
    if how.startswith("Bus error"):
        why = "shared memory ran out: enlarge /dev/shm (docker: --shm-size 8g) or use fewer workers"
    elif how.startswith("Segmentation fault"):
        why = "the code that reads them has a fault: start again with 0 workers to see where"
    else:
        why = "most often memory ran out: start again with fewer workers"
    return f"{what} was lost ({how}), and {why}"
