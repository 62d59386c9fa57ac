"""Ctrl-C and SIGTERM let a run save before it stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dino.runtime import Ranks


@contextmanager
def stop_on_signals(ranks: Ranks) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the run saves before it stops.

    One process only: several would not stop at the same step, so they resume from the last save.
    """
    stop = threading.Event()
    if ranks.world > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, lambda *_: stop.set()) for name in names}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
