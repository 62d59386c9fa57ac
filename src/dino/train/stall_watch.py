"""A sentence when a run stands still: which rank waits, and for what."""

from __future__ import annotations

import threading
from collections.abc import Callable

from dino import rendezvous

STALLED = 300.0
"""Seconds after which one activity is reported, if that is ten steps or more."""
ADVICE = {
    "reading": "check the disk, or the network share, of the images",
    "saving": "check the disk, or the network share, of the run folder",
    "training": "look at the load of the machines, and for processes that have ended",
}
"""By the first word of an activity; others are not reported."""


class StallWatch:
    """While it is a context, reports each activity (`rendezvous.doing`) that takes too long, once.

    Args:
        say: prints a sentence.
        seconds: that are too long.
    """

    def __init__(self, say: Callable[[str], object], seconds: float = STALLED) -> None:
        self._say, self._seconds, self._ended = say, seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dino-stalls", daemon=True)

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        before, seconds = None, 0.0
        while not self._ended.wait(pause := self._seconds / 30):
            seconds = seconds + pause if before is (now := rendezvous.activity()) else 0.0
            before = now
            advice = ADVICE.get(now.partition(" ")[0])
            if advice is not None and seconds >= self._seconds > seconds - pause:
                self._say(
                    f"standing still: {now} takes more than {self._seconds / 60:.0f} minutes"
                    f"{rendezvous.others()}: {advice}"
                )
