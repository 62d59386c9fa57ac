"""Time and memory before the first step: nothing of the run changes, and what is chosen fits."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small import TINY_RUN, images, state
from PIL import Image

from dino import cli
from dino.files import UserError
from dino.runtime import Ranks
from dino.train.config import PretrainConfig
from dino.train.loop import _Loop, train
from dino.train.planning import estimate as module
from dino.train.planning import introduction
from dino.train.planning.estimate import Estimate, Trial
from dino.train.planning.introduction import advice, describe, duration
from dino.train.recipes import demo, small_data
from dino.train.run_folder import RunFolder, read_config

CPU = torch.device("cpu")
GIB = 2**30


def config(**changes: Any) -> PretrainConfig:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return demo().changed({**TINY_RUN, **named})


@pytest.mark.parametrize(
    ("others", "threads", "words"),
    [
        (1.8, 4, "other processes use 1.8 of 4 cores.*OMP_NUM_THREADS=2 in front"),
        (9.0, 4, "OMP_NUM_THREADS=1 in front"),
        (0.3, 4, None),
        (2.0, 2, None),
    ],
)
def test_busy_cores_are_reported(
    others: float, threads: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(introduction, "busy_cores", lambda: others)
    monkeypatch.setattr(introduction, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = introduction._busy()
    assert bool(found) == bool(words)
    assert words is None or re.search(words, found)


def loop(run: Path, **changes: Any) -> _Loop:
    found = _Loop(config(**changes), images(), RunFolder(run, Ranks()), CPU, [], None)
    found.build()
    return found


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Memory as the test says: `free` bytes, of which an image takes `image` and a step `fixed`."""
    system: dict[str, float] = {"free": 100.0, "image": 1.0, "fixed": 0.0}
    measured = Trial(0, 0.0, 0)

    def rehearse(images: int) -> Trial:
        return measured._replace(images=images, seconds=0.01, bytes=int(system["image"] * images))

    def trials(measure: Any, first: int, largest: int, available: float) -> list[Trial]:
        return original(rehearse, first, largest, available)

    original = module._trials
    monkeypatch.setattr(module, "_trials", trials)
    monkeypatch.setattr(module, "free_memory", lambda device: int(system["free"]))
    monkeypatch.setattr(module, "_fixed_bytes", lambda *_: int(system["fixed"]))
    return system


# ------------------------------------------------------------------------------------ the run
@pytest.mark.parametrize("changes", [{}, {"head__batch_norm": True}, {"execution__micro_batch": 2}])
def test_nothing_of_the_run_changes(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = loop(tmp_path, **changes)
    before, torch_state = state(ours.distillation), torch.get_rng_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    ours._estimate_cost()
    after = state(ours.distillation)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in ours.distillation.student.parameters())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_a_data_set_that_draws_random_numbers_does_not_change_the_run(tmp_path: Path) -> None:
    ours = loop(tmp_path)
    drawn = torch.get_rng_state()
    read = ours.source.open

    def draws(index: int) -> Any:
        torch.rand(3), random.random(), np.random.rand()
        return read(index)

    ours.source.open = draws  # type: ignore[method-assign]
    python_state = random.getstate()
    ours._estimate_cost()
    assert torch.equal(drawn, torch.get_rng_state())
    assert python_state == random.getstate()


def test_the_estimate_is_of_a_step(tmp_path: Path) -> None:
    ours = loop(tmp_path)
    ours._estimate_cost()
    found = ours.estimate
    assert 0 < found.image_seconds < found.step_seconds
    assert found.micro_batch is None
    assert found.peak > 0


# ------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(
    ("free", "micro_batch"),
    [(100, None), (4 / 0.85 + 1e-9, None), (4 / 0.86, 2), (3.0, 2), (1.2, 1)],
)
def test_the_micro_batch_fits_the_free_memory(
    tmp_path: Path, memory: dict[str, float], free: float, micro_batch: int | None
) -> None:
    memory.update(free=free * GIB, image=GIB)
    ours = loop(tmp_path)
    ours._estimate_cost()
    assert ours.distillation.micro_batch == micro_batch
    assert ours.estimate.peak <= 0.85 * free * GIB + 1


def test_what_never_fits_is_refused(tmp_path: Path, memory: dict[str, float]) -> None:
    memory.update(free=GIB, image=2 * GIB)
    with pytest.raises(UserError, match="even with one image at a time: lower --batch"):
        loop(tmp_path)._estimate_cost()


def test_batch_norm_gets_the_batch_that_fits(tmp_path: Path, memory: dict[str, float]) -> None:
    memory.update(free=3 * GIB, image=GIB)
    with pytest.raises(
        UserError, match=r"4.0 GiB, and may take 85% of the 3.0 GiB that are free.*--batch 2 "
    ):
        loop(tmp_path, head__batch_norm=True)._estimate_cost()


def test_a_chosen_micro_batch_is_taken_or_refused(tmp_path: Path, memory: dict[str, float]) -> None:
    memory.update(free=4.2 * GIB, image=GIB)  # more than is planned for, but it fits
    ours = loop(tmp_path, execution__micro_batch=4)
    ours._estimate_cost()
    assert ours.distillation.micro_batch == 4
    memory.update(free=3.9 * GIB)
    with pytest.raises(UserError, match=r"take --execution.micro-batch 2"):
        loop(tmp_path, execution__micro_batch=4)._estimate_cost()


def test_an_interrupted_run_takes_its_micro_batch_again(
    tmp_path: Path, memory: dict[str, float]
) -> None:
    memory.update(free=3 * GIB, image=GIB)
    train(config(run__duration="3 steps"), images(), tmp_path, device=CPU)
    assert read_config(tmp_path / "config.json")["micro_batch"] == 2
    memory.update(free=100 * GIB)
    again = loop(tmp_path, run__duration="3 steps")
    again._estimate_cost()
    assert again.distillation.micro_batch == 2


def test_a_slow_step_is_split_so_that_progress_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_SECONDS", 1e-9)
    ours = loop(tmp_path)
    ours._estimate_cost()
    assert ours.distillation.micro_batch == 1
    done: list[float] = []
    ours.state.step = 0
    batch = next(iter(ours.loader))
    ours.distillation.step(ours._views(batch), 0, done.append)
    assert done == [1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0]


# ------------------------------------------------------------------------------------ words
@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (7, "7 s"),
        (99, "99 s"),
        (100, "2 min"),
        (59.4 * 60, "59 min"),
        (125 * 60, "2 h 05 min"),
        (27 * 86400, "27.0 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_line_adds_up() -> None:
    found = Estimate(8, 2.0, 0.5, 3 * GIB, 12 * GIB)
    line = describe(found, batch=64, world=2, steps=100, evaluated=400)
    assert line.startswith("about 32 images/s: 5 min to the end (")
    assert line.endswith("memory 3.0 of 12.0 GiB free for each process; micro-batches of 8")
    assert "memory" not in describe(Estimate(None, 1.0, 0.1, 0, None), 1, 1, 1)


def test_advice_is_for_runs_that_need_it() -> None:
    def given(images: int | None, seconds: float, recipe: str = "small_data") -> list[str]:
        return advice(small_data(), images, recipe, "--data d --out r", seconds)

    few, long = given(100, 60.0), given(100_000, 30 * 86400.0)
    assert "100 images are few" in few[0]
    assert few[0].endswith("small_data --data d --out r --init-from dino_vits16")
    assert "takes 30.0 days" in long[0]
    assert "dino pretrain laptop --data d --out r, or 4 epochs in a night" in long[0]
    assert (len(few), len(long)) == (1, 1)
    assert given(None, 60.0) == []  # it starts from weights already
    assert given(100, 30 * 86400.0, "laptop") == []


def test_a_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number * 40, 0, 0)).save(tmp_path / f"photos/{number}.png")
    tiny = [
        word
        for name, value in TINY_RUN.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    out = tmp_path / "run"
    words = ["pretrain", "demo", "--data", str(tmp_path / "photos"), "--out", str(out), "--dry-run"]
    cli.main([*words, *tiny])
    printed = capfd.readouterr().err
    assert "starting: 6 images, 8 steps of 4, recipe demo" in printed
    assert "images/s" in printed
    assert "to the end" in printed
    assert not out.exists()
