"""Workers that die end a run in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import Tensor

from dino.data import workers
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import open_source
from dino.data.views.view_spec import dino_views
from dino.files import UserError

SPECS = dino_views(global_size=8, local_count=0)


class Deadly:
    """A data set whose item 5 ends the process that reads it."""

    def __init__(self, how: str) -> None:
        self.how, self.main = how, os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and os.getpid() != self.main:
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), getattr(signal, self.how))
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def batches(how: str) -> None:
    sampler = EpochSampler(8, 2, stop_step=8)
    list(PretrainLoader(open_source(Deadly(how)), SPECS, sampler, seed=0, workers=1))


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="children end without a signal here")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("SIGKILL", r"was lost \(Killed\), and most often memory ran out: .* fewer workers"),
        ("exit", "ended itself with exit code 3: start again with 0 workers"),
    ],
)
def test_a_worker_that_dies_ends_in_a_sentence(how: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        batches(how)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="children end without a signal here")
def test_a_worker_that_dies_while_nobody_waits_for_it() -> None:
    """Nothing is raised in the middle of a step; the next batch tells."""
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 8
    loader = iter(PretrainLoader(open_source(images), SPECS, EpochSampler(8, 2), 0, workers=1))
    next(loader)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while worker.pid not in workers._said and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"was lost \(Killed\)"):
        next(loader)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "0 workers"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "lost (ended unexpectedly), and most"),
    ],
)
def test_what_pytorch_says_in_other_words(said: str, expected: str) -> None:
    assert expected in workers._sentence(said)
