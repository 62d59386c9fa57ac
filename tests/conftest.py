"""Fixtures of every test: one thread, a fixed seed, no network, no launcher; images of one colour.

pytest-randomly shuffles the tests (`-p no:randomly` keeps them in order), and pytest-timeout ends
those that hang (`timeout` in pyproject.toml).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Sums over several threads depend on their number, and small tensors gain nothing from them. The
# environment applies to child processes too; it is set before torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from helpers.fakes import COLORS, MeanColor
from hypothesis import HealthCheck, settings
from PIL import Image

from dino import runtime

torch.set_num_threads(1)
# A process of tests would otherwise hold all memory that any of its tests took.
runtime.keep_memory = lambda: None

# The same examples on every machine, and no clock: a test that fails here fails for everybody.
# `--hypothesis-profile=search` looks for new ones.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dino", TIMELESS, derandomize=True, max_examples=50)
settings.register_profile("search", TIMELESS, max_examples=500)
settings.load_profile("dino")

LOOPBACK = ("127.", "::1", "localhost")
LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "DINO_TIMEOUT"),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's generator (pytest-randomly seeds those of random and numpy)."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that uses the network fails; addresses of this machine are allowed."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert str(host).startswith(LOOPBACK), f"a test may not use the network: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher is set: a test starts as the only process, rank 0 of 1."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_CACHE", str(folder))
    for name in ("DINO_MIRROR", "DINO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests that pass wrong shapes on purpose: `make shapes` does not check their calls."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def mean_color() -> MeanColor:
    return MeanColor()


@pytest.fixture
def color_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of one-coloured images, `count` of each class."""

    def make(name: str, count: int, colors: dict[str, tuple[int, int, int]] = COLORS) -> Path:
        for color, rgb in colors.items():
            folder = tmp_path / name / color
            folder.mkdir(parents=True)
            for index in range(count):
                shade = tuple(min(255, value + 5 * index) for value in rgb)
                Image.new("RGB", (12 + index, 10), shade).save(folder / f"{index}.png")
        return tmp_path / name

    return make
