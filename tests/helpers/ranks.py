"""Run a function in several gloo processes; the first error comes back with its traceback."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import count
from typing import Any

import torch
import torch.multiprocessing as mp

from dino.runtime import Ranks, process_group

_PORTS = count(os.getpid())


def run(
    function: Callable[..., Any], world: int, *arguments: Any, joined: bool = True
) -> list[Any]:
    """`function(ranks, *arguments)` of every rank, in order.

    With `joined` false only the launcher's environment is set, as torchrun does, and the function
    joins the process group by itself.
    """
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = _free_port()
    processes = [
        context.Process(target=_one, args=(rank, world, port, joined, queue, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            rank, result, error = _next(queue, processes)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world)]


def _free_port() -> int:
    """A port that nobody else takes before the ranks do.

    Not the system's choice: that is free again for any other connection, and for the tests that run
    beside this one. Each of pytest's workers has ports of its own, below those of the system.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + worker % 10 * 1_000 + next(_PORTS) % 1_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _next(queue: Any, processes: list[Any]) -> Any:
    while queue.empty():
        if not any(process.is_alive() for process in processes) and queue.empty():
            raise AssertionError(f"exit codes {[process.exitcode for process in processes]}")
        time.sleep(0.02)
    return queue.get()


def _one(
    rank: int, world: int, port: int, joined: bool, queue: Any, function: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with process_group(torch.device("cpu")) if joined else nullcontext(Ranks(rank, world)):
            # Pickled by value: shared storage would be gone with this process.
            answer = pickle.dumps(function(Ranks(rank, world, rank), *arguments))
        queue.put((rank, answer, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
