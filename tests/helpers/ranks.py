"""Run a function in several gloo processes; an error is raised here with its traceback."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dino.runtime import process_group, ranks

LIMIT = 300.0
"""Seconds for all processes together."""


def run(
    function: Callable[..., Any], world: int, *arguments: Any, joined: bool = True
) -> list[Any]:
    """`function(ranks, *arguments)` of every rank, in order.

    As under torchrun, the parent serves the store on a port that it holds from the beginning, so
    nobody else can take the port.

    Args:
        function: of a module that a new process can import.
        world: the number of processes.
        arguments: for the function.
        joined: whether the processes join the process group first; otherwise only the launcher's
            environment is set.

    Raises:
        AssertionError: if they need more than `LIMIT` seconds.
        ProcessRaisedException: with the traceback of the rank that failed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "DINO_TIMEOUT": str(LIMIT / 60),
        }
        options = (environment, joined, Path(folder), function, arguments)
        mp.get_context("forkserver").set_forkserver_preload(["dino.pretraining"])
        started = mp.start_processes(_one, options, world, join=False, start_method="forkserver")
        try:
            deadline = time.monotonic() + LIMIT
            while not started.join(timeout=1):
                assert time.monotonic() < deadline, f"the ranks took more than {LIMIT:g} s"
        finally:
            for process in started.processes:
                process.kill()
                process.join(timeout=10)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _one(
    rank: int,
    environment: dict[str, str],
    joined: bool,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    with process_group(torch.device("cpu")) if joined else nullcontext(ranks()) as here:
        # Pickled by value: shared storage would be gone with this process.
        answer = pickle.dumps(function(here, *arguments))
    (folder / str(rank)).write_bytes(answer)
