"""How the processes of a job meet, and how each learns that another has failed.

They talk through the store of `torch.distributed` at MASTER_ADDR:MASTER_PORT, which the launcher
serves (torchrun), or else rank 0. Its keys, of each attempt of `torchrun --max-restarts`:

    present    how many processes have come
    go         set when all have come; holds a sentence if one of them fails before
    failed     a sentence of a process that fails later
    informed   how many processes have read such a sentence, or written one
    beat/R     a number that grows while rank R lives, and what it does
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from dino.files import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without a sign of life after which a process counts as failed."""
NOTICE = 20.0
"""Seconds in which a process that fails tells the others."""
ENDED = "ended"


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what this process does in the body, for the messages of others that wait for it."""
    before, _Current.doing = _Current.doing, what
    try:
        yield
    finally:
        _Current.doing = before


def activity() -> str:
    """What `doing` named last: for one activity the same object."""
    return _Current.doing


class _Current:
    """Of this process: what it does, its watch once it has joined, whether it told a failure."""

    doing = "preparing"
    watch: Watch | None = None
    told = False


def served_by_launcher() -> bool:
    """Whether torchrun serves the store, and ends the other processes when one fails."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(rank: int, timeout: float, *, serve: bool = True) -> Store:
    """The store of this job and attempt; rank 0 serves it unless the launcher does.

    Raises:
        RuntimeError: if nobody serves it within `timeout` seconds, or the port is in use.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve and rank == 0 and not served_by_launcher(),
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # The launcher's store lives on when it starts all processes again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dino/{attempt}", store)  # type: ignore[attr-defined]


def meet(rank: int, world: int, timeout: float) -> Store:
    """Wait until all processes of the job have come; then watch them until this one ends.

    Returns:
        The store for their process group.

    Raises:
        UserError: with the sentence of a process that failed before it came here.
        RuntimeError: if not all come within `timeout` seconds.
    """
    store = connect(rank, timeout)
    store.set(f"beat/{rank}", "0 preparing")
    if store.add("present", 1) == world:
        store.set("go", "")
    try:
        store.wait(["go"], timedelta(seconds=timeout))
    except RuntimeError as error:
        came = store.add("present", 0)
        raise RuntimeError(f"{came} of them came") from error
    if message := store.get("go").decode():
        _Current.told = True
        _acknowledge(store, rank, world)
        raise UserError(message)
    _Current.watch = Watch(store, rank, world)
    _Current.watch.start()
    return dist.PrefixStore("group", store)  # type: ignore[attr-defined]


def report_failure(message: str) -> None:
    """Tell the other processes of this job that this one fails; nothing for a single process.

    Before they have met torchrun needs no telling: it ends all when one fails.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1" or _Current.told:
        return
    with suppress(RuntimeError, ValueError, KeyError):  # nobody can be told
        rank, watch = int(os.environ["RANK"]), _Current.watch
        sentence = f"rank {rank} stopped: {message}"
        if watch is not None:
            _Current.told = True
            if not watch.store.check(["failed"]):
                watch.store.set("failed", sentence)
            _acknowledge(watch.store, rank, int(world))
        elif not served_by_launcher():
            _Current.told = True
            store = connect(rank, NOTICE)
            store.set("go", sentence)
            _acknowledge(store, rank, int(world))


@contextmanager
def reported_failures() -> Iterator[None]:
    """Report an error of the body while the others wait for this process to come."""
    try:
        yield
    except Exception as error:
        if _Current.watch is None:
            report_failure(str(error) or type(error).__name__)
        raise


def leave() -> None:
    """Stop watching: this process ends, and nobody shall miss it."""
    watch, _Current.watch = _Current.watch, None
    if watch is not None:
        watch.stop()


def others() -> str:
    """What the other processes do, such as "; rank 1 is reading the images of step 3"."""
    watch = _Current.watch
    if watch is None:
        return ""
    with suppress(RuntimeError):
        ranks = [rank for rank in range(watch.world) if rank != watch.rank][:8]
        beats = watch.own_store.multi_get([f"beat/{rank}" for rank in ranks])
        texts = [beat.decode().partition(" ")[2] for beat in beats]
        return "".join(f"; rank {r} was {t}" for r, t in zip(ranks, texts, strict=True) if t)
    return ""


def _acknowledge(store: Store, rank: int, world: int) -> None:
    """Count this process as informed; who serves the store waits until all are, for a time."""
    informed, deadline = store.add("informed", 1), time.monotonic() + NOTICE
    while rank == 0 and not served_by_launcher() and informed < world:
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)
        informed = store.add("informed", 0)


class Watch(threading.Thread):
    """Gives signs of life, and ends this process when another has failed.

    Rank 0 watches all others, and each of these watches rank 0. A process that is stopped, killed
    or hangs gives no sign. When torchrun itself was killed, this process gets SIGTERM: a run saves
    and stops.

    Args:
        store: as `connect` gives it.
        rank, world: of this process.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        super().__init__(name="dino-watch", daemon=True)
        self.rank, self.world, self.store = rank, world, store
        # The store of the process group may be locked by a call that waits.
        self.own_store = connect(rank, NOTICE, serve=False)
        self._stopped, self._parent = threading.Event(), os.getppid()
        self._beats: dict[int, bytes] = {}
        self._quiet: defaultdict[int, int] = defaultdict(int)
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def stop(self) -> None:
        """End the thread; the others hear that this process ends as it should."""
        self._stopped.set()
        self.join(NOTICE)
        sys.excepthook = self._hook
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", ENDED)

    def run(self) -> None:
        """Until `stop`, or until the store is gone: the group notices that itself."""
        for number in count(1):
            if self._stopped.wait(BEAT):
                return
            if served_by_launcher() and self._parent not in (1, os.getppid()):
                os.write(2, b"dino: torchrun has ended\n")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            try:
                self.beat(number)
            except RuntimeError:
                return

    def beat(self, number: int) -> None:
        """One sign of life, and a look at the others."""
        self.own_store.set(f"beat/{self.rank}", f"{number} {_Current.doing}")
        if self.own_store.check(["failed"]):
            self._end(self.own_store.get("failed").decode())
        watched = range(1, self.world) if self.rank == 0 else [0]
        beats = self.own_store.multi_get([f"beat/{other}" for other in watched])
        for other, beat in zip(watched, beats, strict=True):
            same = beat == self._beats.get(other) and beat != ENDED.encode()
            self._quiet[other] = self._quiet[other] + 1 if same else 0
            self._beats[other] = beat
            if self._quiet[other] * BEAT >= SILENCE:
                last = beat.decode().partition(" ")[2]
                sentence = f"rank {other} gave no sign of life for {SILENCE:g} s (it was {last})"
                self.own_store.set("failed", f"{sentence}: see its log and its machine")

    def _end(self, sentence: str) -> None:
        if _Current.told:  # this process is ending already
            return
        with suppress(OSError):
            os.write(2, f"dino: {sentence}; this is rank {self.rank}, which stops too\n".encode())
        with suppress(RuntimeError):
            _acknowledge(self.own_store, self.rank, self.world)
        os._exit(2)

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._hook(kind, error, trace)
        report_failure(f"{kind.__name__}: {error}")
