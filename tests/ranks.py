"""Run a function in several gloo processes; the first error comes back with its traceback."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.multiprocessing as mp

from dino.runtime import Ranks, process_group


def run(
    function: Callable[..., Any], world: int, *arguments: Any, joined: bool = True
) -> list[Any]:
    """`function(ranks, *arguments)` of every rank, in order.

    With `joined` false only the launcher's environment is set, as torchrun does, and the function
    joins the process group by itself.
    """
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
