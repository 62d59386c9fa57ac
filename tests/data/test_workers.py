"""Dead workers end a run in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from itertools import islice

import pytest
import torch
from torch import Tensor

from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import open_source
from dino.data.views.view_spec import ViewSettings
from dino.files import UserError

SPECS = ViewSettings(global_size=8, local_count=0).specs()


class Deadly:
    """A data set whose item 5 ends the process that reads it, or raises."""

    def __init__(self, how: str) -> None:
        self.how, self.main = how, os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and os.getpid() != self.main:
            if self.how == "exit":
                os._exit(3)
            if self.how == "raise":
                raise ValueError("no such item")
            os.kill(os.getpid(), getattr(signal, self.how))
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def batches(how: str) -> None:
    sampler = EpochSampler(8, 2, stop_step=8)
    list(PretrainLoader(open_source(Deadly(how)), SPECS, sampler, seed=0, workers=1))


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="children end without a signal here")
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("SIGKILL", "ended with exit code -9: most often memory ran out: .* fewer workers"),
        ("SIGBUS", "ended with exit code -7: shared memory ran out: .* --shm-size"),
        ("exit", "ended with exit code 3: start again with 0 workers"),
    ],
)
def test_a_dead_worker_ends_in_one_sentence(how: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        batches(how)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="children end without a signal here")
def test_a_worker_that_dies_between_batches_interrupts_nothing() -> None:
    """The error is raised where the next batch is due."""
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 8
    loader = iter(PretrainLoader(open_source(images), SPECS, EpochSampler(8, 2), 0, workers=1))
    others = set(multiprocessing.active_children())
    next(loader)
    [worker] = set(multiprocessing.active_children()) - others
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join(timeout=60)
    time.sleep(0.1)  # a handler of SIGCHLD would raise here
    with pytest.raises(UserError, match="exit code -9"):
        list(islice(loader, 8))  # some were ready


def test_an_error_of_a_live_worker_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"reading item 5 .* failed"):
        batches("raise")
