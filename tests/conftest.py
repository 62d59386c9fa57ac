"""What holds for every test: one thread, its own seed, no network, and checked shapes.

Beside this file, pytest-randomly shuffles the tests (`-p no:randomly` to keep them in order).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Sums over several threads depend on their number, and small tensors gain nothing from them. In
# the environment, so that the processes that tests start keep to it too; before torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same examples on every machine, and no clock: a test that fails here fails for everybody.
# `--hypothesis-profile=search` looks for new ones.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dino", TIMELESS, derandomize=True, max_examples=50)
settings.register_profile("search", TIMELESS, max_examples=500)
settings.load_profile("dino")

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Torch's own generator starts anew (pytest-randomly does so for random and numpy)."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails; this machine's own addresses stay open."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert str(host).startswith(LOOPBACK), f"a test may not use the network: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables leak in: a test starts as the only process, rank 0 of 1."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloads and indices of a test go into a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_CACHE", str(folder))
    for name in ("DINO_MIRROR", "DINO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests that hand over wrong shapes on purpose: `make shapes` leaves their calls alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
