"""Turn PyTorch's errors about dead workers into one sentence."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader

from dino.files import UserError

TOO_MANY = "This DataLoader will create"
"""PyTorch's warning of more workers than cores, which are the user's choice."""

_CAUSES = {  # exit code, which is a signal's negative number
    -7: "shared memory ran out: enlarge /dev/shm (docker: --shm-size 8g) or use fewer workers",
    -9: "most often memory ran out: start again with fewer workers",
    -11: "the code that reads images has a fault: start again with 0 workers to see where",
}


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, whose workers are started here.

    PyTorch's handler of SIGCHLD would raise in the middle of a training step. It is taken off
    again, so that PyTorch finds a dead worker when the next batch is due, within five seconds.

    Raises:
        UserError: if a worker has died.
    """
    main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    with warnings.catch_warnings():  # workers run one thread and need none of the others
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        warnings.filterwarnings("ignore", TOO_MANY, UserWarning)
        batches = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        workers = getattr(batches, "_workers", [])
        ended = wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            worker.join(1 if worker.sentinel in ended else 0)
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if not codes:
            raise
        cause = _CAUSES.get(codes[0], "start again with 0 workers to see why")
        raise UserError(
            f"a process that reads images ended with exit code {codes[0]}: {cause}"
        ) from error
