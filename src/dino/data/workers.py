"""Worker processes that die: PyTorch's riddle becomes a sentence that says what to do.

PyTorch raises its error from the handler of a signal, wherever the program happens to be: in the
middle of a step, or in a destructor, where it is lost. Here the handler takes a note, and the error
is raised where the next batch is asked for.
"""

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

# What `next` of a DataLoader raises beside OSError and EOFError when a worker has died.
_RIDDLES = ("DataLoader worker", "received 0 items")

_said: dict[int, str] = {}  # of each dead worker, by its process id, what PyTorch said


def watched(batches: Any) -> Iterator[Any]:
    """The batches of a `DataLoader`.

    Args:
        batches: the iterator, whose workers have been started.

    Raises:
        UserError: if a worker has died.
    """
    _listen()
    workers = {worker.pid for worker in batches._workers}
    for worker in workers:
        _said.pop(worker, None)  # of an earlier process of this number
    return _watched(batches, workers)


def _watched(batches: Any, workers: set[int]) -> Iterator[Any]:
    while True:
        if not workers.isdisjoint(_said):
            raise UserError(_sentence(_death(workers)))
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(_RIDDLES):
                raise
            raise UserError(_sentence(_death(workers))) from error
        yield batch


def _death(workers: set[int]) -> str:
    """What PyTorch says of the worker that died; its signal may come a little later."""
    deadline = time.monotonic() + SIGNALLED
    while workers.isdisjoint(_said) and time.monotonic() < deadline:
        time.sleep(0.02)
    return next((_said[worker] for worker in workers if worker in _said), "")


def _listen() -> None:
    """Let PyTorch's handler for the end of a child take a note instead of raising."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    theirs = signal.getsignal(signal.SIGCHLD)
    if callable(theirs) and not isinstance(theirs, _Handler):
        signal.signal(signal.SIGCHLD, _Handler(theirs))


class _Handler:
    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.theirs(number, frame)
        except RuntimeError as error:
            if (worker := re.match(r"DataLoader worker \(pid (\d+)\)", str(error))) is None:
                raise
            _said[int(worker[1])] = str(error)


def _sentence(said: str) -> str:
    """What PyTorch says of a dead worker in other words."""
    what = "a process that reads images"
    if code := re.search(r"with exit code (\d+)", said):
        how = f"ended itself with exit code {code[1]}"
        return f"{what} {how}: start again with 0 workers to see why"
    told = re.search(r"killed by signal: ([^.]+)", said)
    how = told[1] if told else "ended unexpectedly"
    if how.startswith("Bus error"):
        why = "shared memory ran out: enlarge /dev/shm (docker: --shm-size 8g) or use fewer workers"
    elif how.startswith("Segmentation fault"):
        why = "the code that reads them has a fault: start again with 0 workers to see where"
    else:
        why = "most often memory ran out: start again with fewer workers"
    return f"{what} was lost ({how}), and {why}"
