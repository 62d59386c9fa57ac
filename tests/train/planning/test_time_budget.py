"""Runs for a time: they end with it, schedules and all, whatever the speed does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small import TINY_RUN, images, schedules
from PIL import Image

import dino
from dino import cli, pretraining
from dino.data.sources.open import open_source
from dino.distillation.schedules import in_seconds
from dino.distillation.step import Distillation
from dino.files import UserError
from dino.runtime import Ranks
from dino.train import loop
from dino.train.config import PretrainConfig
from dino.train.planning import budget, time_budget
from dino.train.planning.budget import Budget, Candidate, chosen, ladder, parse, timed
from dino.train.planning.time_budget import FITS, TimeBudget
from dino.train.recipes import demo
from dino.train.run_folder import read_config
from dino.train.run_log import read_metrics

CPU = torch.device("cpu")
TIMED = TINY_RUN | {"run.duration": "1 minutes", "optim.warmup": "10%"}


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of runs for a time; a step takes one second of it."""
    ours, step = Clock(), Distillation.step

    def slow(*arguments: Any) -> Any:
        ours.now += 1
        return step(*arguments)

    monkeypatch.setattr(Distillation, "step", slow)
    for module in (time_budget, loop):
        monkeypatch.setattr(module, "time", ours)
    monkeypatch.setattr(pretraining, "monotonic", ours.monotonic)
    return ours


def config(**changes: Any) -> PretrainConfig:
    return demo().changed({**TIMED, **{k.replace("__", "."): v for k, v in changes.items()}})


# ------------------------------------------------------------------------------- durations
@pytest.mark.parametrize(
    ("text", "seconds", "duration"),
    [
        ("2h", 7200, "2 hours"),
        ("90min", 5400, "1.5 hours"),
        ("1h30m", 5400, "1.5 hours"),
        ("1.5 hours", 5400, "1.5 hours"),
        ("3 days", 259200, "72 hours"),
        ("45 Minutes", 2700, "45 minutes"),
        ("30s", 30, "0.5 minutes"),
    ],
)
def test_budgets(text: str, seconds: float, duration: str) -> None:
    assert parse(text) == Budget(seconds)
    assert parse(f"+{text}") == Budget(seconds, more=True)
    assert Budget(seconds).duration == duration
    assert in_seconds(duration) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2 weeks", "5s", "-2h", "2h 3", "nan h", "9999 days"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no time: give for example 2h"):
        parse(text)


# ------------------------------------------------------------------------------- the total
@pytest.mark.parametrize(
    "cost",
    [
        lambda share: 1.0,
        lambda share: 1.0 if share < 0.5 else 2.0,
        lambda share: 2.0 - share,
        lambda share: 5.0 if 0.3 < share < 0.4 else 1.0,
    ],
)
@pytest.mark.parametrize("expected", [0.5, 1.0, 3.0])
def test_a_run_ends_with_its_time_at_any_speed(
    monkeypatch: pytest.MonkeyPatch, cost: Callable[[float], float], expected: float
) -> None:
    """The schedules keep to the time, without a jump."""
    ours = Clock()
    monkeypatch.setattr(time_budget, "time", ours)
    limit = TimeBudget(10_000, started=990.0)
    step, total = 0, limit.total(0, expected, 100.0)
    planned = schedules(total=total, warmup=0)
    places, rates = [(0.0, 0.0)], []
    while step < total:
        rates.append(planned.lr_at(step))
        ours.now += cost(limit.spent / 10_000)
        step += 1
        if step % max(1, total // FITS) == 0 and (speed := limit.speed(step)) is not None:
            total = limit.total(step, speed, 100.0)
            planned = planned.ending(total, step)
        places.append((planned.position(step) / planned.total, limit.spent / 9_900))
    assert limit.spent == pytest.approx(9_900, rel=0.01)
    assert places[-1][0] == 1
    assert max(abs(place - spent) for place, spent in places) < 0.1
    assert all(0 <= after - before < 0.005 for (before, _), (after, _) in pairwise(places))
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(planned.lr_end, rel=0.01)


def test_a_run_for_a_time_ends_with_it_and_resumes(tmp_path: Path, clock: Clock) -> None:
    result = loop.train(config(), images(), tmp_path / "a", device=CPU, started=clock.now - 10)
    assert result.finished
    assert 45 <= result.total == result.step <= 50
    assert read_config(tmp_path / "a" / "config.json")["total_steps"] == result.total
    rates = [line["lr"] for line in read_metrics(tmp_path / "a") if "lr" in line]
    assert max(rates) > 20 * rates[-1]
    again = loop.train(config(), images(), tmp_path / "a", device=CPU)
    assert (again.step, again.total) == (result.step, result.total)


def test_a_killed_run_counts_the_time_before(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Distillation.step

    def killed(self: Distillation, views: Any, number: int, *rest: Any) -> Any:
        if number == 31:
            raise KeyboardInterrupt
        return step(self, views, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(), images(), tmp_path, device=CPU)
    clock.now += 5000  # the time in which nothing was done
    result = loop.train(config(), images(), tmp_path, device=CPU)
    assert 55 <= result.total == result.step <= 60


def test_a_finished_run_goes_on_for_more_time(tmp_path: Path, clock: Clock) -> None:
    first = loop.train(config(), images(), tmp_path, device=CPU)
    with pytest.raises(UserError, match=r"run.duration is '1 minutes' there and '0.5 minutes'"):
        loop.train(config(run__duration="0.5 minutes"), images(), tmp_path, device=CPU)
    before = budget.resumed(tmp_path, parse("+2min"))
    assert before is not None
    more, recipe = before
    assert (more, recipe) == (config(run__duration="3 minutes"), "own")
    result = loop.train(more, images(), tmp_path, device=CPU)
    assert first.total <= 60 < 170 <= result.total == result.step <= 180
    assert budget.resumed(tmp_path / "none", parse("2h")) is None
    with pytest.raises(UserError, match="holds no run that could go on"):
        budget.resumed(tmp_path / "none", parse("+2h"))


def test_a_run_of_epochs_gets_no_more_time(tmp_path: Path) -> None:
    loop.train(config(run__duration="2 steps"), images(), tmp_path, device=CPU)
    with pytest.raises(UserError, match="holds a run of 2 steps, whose schedules end with it"):
        budget.resumed(tmp_path, parse("+2h"))


# ------------------------------------------------------------------------------- the choice
def found(*speeds: float) -> list[Candidate]:
    return [
        Candidate(config, speed, problem="" if speed else "too large")
        for config, speed in zip(ladder(10_000), speeds, strict=False)
    ]


def test_more_time_allows_larger_networks() -> None:
    hours = [1, 100, 1000]
    best = [chosen(found(90, 40, 20), 10_000, 3600 * h, Budget(3600 * h))[0] for h in hours]
    sizes = [config.views.global_size for config in best]
    assert sizes == sorted(sizes)
    assert sizes[0] == 64 < sizes[-1]
    assert [config.run.duration for config in best] == ["1 hours", "100 hours", "800 epochs"]


def test_what_does_not_fit_is_not_chosen() -> None:
    best, _ = chosen(found(90, 0, 0), 10_000, 1e7, Budget(1e7))
    assert best.views.global_size == 64
    with pytest.raises(UserError, match="too large"):
        chosen(found(0, 0, 0), 10_000, 1e7, Budget(1e7))


@pytest.mark.parametrize("count", [1, 2, 40, 10_000, 10_000_000])
def test_the_ladder_suits_any_number_of_images(count: int) -> None:
    for config in ladder(count):
        config.check()
        assert config.run.batch <= max(2, count)
        assert 1024 <= config.head.prototypes <= 65536


def test_few_images_do_not_take_all_of_a_long_time() -> None:
    best, why = chosen(found(90, 40, 20), 40, 7200, Budget(7200))
    assert best.run.duration == "800 epochs"
    assert "800 epochs suffice" in why


# ------------------------------------------------------------------------------- the command
@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images; the networks of the ladder are tiny."""
    tiny = TINY_RUN | {"run.duration": "1 steps", "optim.warmup": "10%"}
    sizes = [{"views.global_size": size} for size in (16, 24)]
    monkeypatch.setattr(budget, "laptop", lambda: demo().changed(tiny))
    monkeypatch.setattr(budget, "MOST_EPOCHS", 10**9)  # however fast this machine is
    monkeypatch.setattr(budget, "RUNGS", tuple(map(budget.Rung, sizes, (0, 1e12))))
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "photos").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "photos" / path.name)
    return tmp_path / "photos"


def test_the_command_chooses_trains_and_goes_on(
    photos: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    run = photos.parent / "run"
    words = ["pretrain", str(photos), "--budget", "30s", "--out", str(run)]
    cli.main([*words, "--dry-run"])
    shown = capsys.readouterr().err
    assert "vit_tiny/8, 16 px" in shown
    assert "chosen: vit_tiny/8, 16 px" in shown
    assert "recipe budget" in shown
    assert not run.exists()
    cli.main([*words, "--lr", "1e-3"])
    content = read_config(run / "config.json")
    assert content["defining"]["run.duration"] == "0.5 minutes"
    assert content["defining"]["optim.lr"] == 1e-3
    assert 20 <= content["total_steps"] <= 30
    capsys.readouterr()
    cli.main([*words[:-3], "+30s", "--out", str(run)])  # keeps its choice, and its rate
    assert "chosen" not in capsys.readouterr().err
    content = read_config(run / "config.json")
    assert content["defining"]["run.duration"] == "1 minutes"
    assert content["defining"]["optim.lr"] == 1e-3
    assert 50 <= content["total_steps"] <= 60


def test_without_a_recipe_and_a_budget_there_is_one_hour(
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = photos.parent / "run"
    monkeypatch.setattr("dino.pretraining.DEFAULT", "30s")
    cli.main(["pretrain", str(photos), "--out", str(run), "--lr", "1e-3"])
    shown = capsys.readouterr().err
    assert "a budget of 30s, since no recipe and no --budget is given" in shown
    content = read_config(run / "config.json")
    assert content["about"]["recipe"] == "budget"
    assert content["defining"]["run.duration"] == "0.5 minutes"
    assert content["defining"]["optim.lr"] == 1e-3
    cli.main(["pretrain", str(photos), "--budget", "1m", "--out", str(run)])
    cli.main(["pretrain", str(photos), "--out", str(run)])  # is finished, and stays so
    shown = capsys.readouterr().err
    assert "a budget of" not in shown
    assert "chosen" not in shown
    assert read_config(run / "config.json")["defining"]["run.duration"] == "1 minutes"


def test_any_run_is_resumed_without_its_recipe(photos: Path) -> None:
    run = photos.parent / "run"
    recipe = demo().changed({**TINY_RUN, "run.duration": "3 steps"})
    dino.pretrain(recipe, data=photos, out=run, recipe_name="mine")
    before = read_config(run / "config.json")
    result = dino.pretrain(data=photos, out=run)
    assert (result.step, result.finished) == (3, True)
    assert read_config(run / "config.json") == before


def test_networks_out_of_reach_are_not_timed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "ALWAYS_TIMED", 1)
    source = open_source(photos)
    configs = ladder(len(source))
    for seconds, count in ((1e-6, 1), (1e12, 2)):
        found = timed(configs, source, CPU, Ranks(), seconds)
        assert len(found) == count
        assert chosen(found, len(source), seconds, Budget(60))[0].views.global_size in (16, 24)


def test_gpus_are_given_large_batches() -> None:
    cpu, gpu = ladder(10_000)[0], ladder(10_000, device="cuda")[0]
    assert (cpu.run.batch, gpu.run.batch) == (32, 256)
    # AdamW's rate grows by the root of 8; the setting is for 256 images.
    assert gpu.optim.lr == pytest.approx(cpu.optim.lr / 8 * 8**0.5)
    assert gpu.teacher.momentum == pytest.approx(cpu.teacher.momentum**8)
    assert ladder(40, device="cuda")[0].run.batch == 32


@pytest.mark.parametrize("case", ["five channels", "one image", "a month"])
def test_unusual_images_and_times(photos: Path, case: str, clock: Clock) -> None:
    options: dict[str, Any] = {"budget": "20s", "data": photos}
    settings: dict[str, Any] = {}
    if case == "five channels":
        options["data"] = np.random.default_rng(0).integers(0, 255, (9, 24, 24, 5), dtype=np.uint8)
        settings = {"pixels.channels": 5, "pixels.mean": (0.5,) * 5, "pixels.std": (0.2,) * 5}
    elif case == "one image":
        for path in sorted(photos.iterdir())[1:]:
            path.unlink()
    else:
        options |= {"budget": "30 days", "dry_run": True}
    result = dino.pretrain(out=photos.parent / "run", settings=settings, **options)
    if case != "a month":
        assert result.step == result.total > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon"], "is no time: give for example 2h"),
        (["--budget", "2h", "--epochs", "3"], "--budget is the duration of the run"),
        (["--budget", "2h", "--init-from", "dino_vits16"], "name a recipe, such as dino pretrain"),
        (["--budget", "+2h"], "holds no run that could go on: give --budget without +"),
        (["laptop", "--budget", "+2h"], "holds no run that could go on: give --budget without +"),
    ],
)
def test_mistakes_of_budgets(
    photos: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", *words, "--data", str(photos), "--out", str(photos.parent / "run")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_recipe_takes_a_budget(photos: Path, clock: Clock) -> None:
    result = dino.pretrain(
        demo().changed(TINY_RUN), data=photos, out=photos.parent / "run", budget="20s"
    )
    assert 10 <= result.step == result.total <= 20
