"""Run a function in several gloo processes; the first error comes back with its traceback."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from dino.runtime import Ranks, process_group


def run(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` of every rank, in order."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_one, args=(rank, world, port, queue, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get()
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world)]


def _one(rank: int, world: int, port: int, queue: Any, function: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with process_group(torch.device("cpu")) as ranks:
            assert ranks == Ranks(rank, world, rank)
            queue.put((rank, function(ranks, *arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
