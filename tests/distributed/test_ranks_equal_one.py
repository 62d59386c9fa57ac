"""Two gloo processes with half a batch each equal one process with the full batch."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run
from helpers.small import (
    PROTOTYPES,
    TINY_RUN,
    assert_same,
    distillation,
    groups,
    images,
    schedules,
    state,
)
from safetensors.torch import load_file
from torch import Tensor

from dino import pretraining, runtime
from dino.distillation.targets import KeyQueue, SinkhornKnopp
from dino.runtime import Ranks
from dino.train.config import PretrainConfig
from dino.train.loop import train
from dino.train.recipes import demo

STEPS = 3


def queue() -> KeyQueue:
    torch.manual_seed(3)
    return KeyQueue(20, PROTOTYPES)


def trajectory(ranks: Ranks, options: dict[str, Any], poison: bool) -> dict[str, Tensor]:
    """State, losses and gradients after some steps on this rank's part of each batch."""
    ours = distillation(ranks=ranks, **copy.deepcopy(options))  # a queue changes
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        batch = groups(step, batch=4)
        if poison and step == 1:
            batch[0][0, 3, 0, 0, 0] = float("nan")  # on the last rank only
        share = 4 // ranks.world
        part = slice(ranks.rank * share, (ranks.rank + 1) * share)
        report = ours.step([group[:, part] for group in batch], step)
        found[f"loss{step}"] = report.loss
        unit = ours.targets.unit  # one of the two measures is not defined
        found[f"targets{step}"] = report.target_spread if unit else report.teacher_entropy
        found[f"refused{step}"] = report.found_inf.double()
    gradients = {f"gradient.{n}": p.grad for n, p in ours.student.named_parameters()}
    return {**found, **state(ours), **{n: g.clone() for n, g in gradients.items() if g is not None}}


@pytest.mark.parametrize(
    ("options", "poison"),
    [
        ({"clip": 0.05, "drop_path": 0.4}, False),
        ({"micro_batch": 1, "head": {"fixed_norm": False}}, False),
        ({"streamed": False, "optimizer": "lars"}, False),
        ({}, True),
        ({"micro_batch": 1, "planned": schedules(backbone_freeze_steps=2)}, False),
        ({"targets": SinkhornKnopp(), "planned": schedules(teacher="previous_iteration")}, True),
        ({"kind": "contrastive", "targets": queue(), "predictor": True}, True),
    ],
    ids=[
        "streamed",
        "micro-batches",
        "whole-lars",
        "not-finite-on-one-rank",
        "head-warm-up",
        "sinkhorn",
        "contrastive",
    ],
)
def test_two_ranks_equal_one(options: dict[str, Any], poison: bool) -> None:
    one = trajectory(Ranks(), options, poison)
    two = run(trajectory, 2, options, poison)
    if poison:
        assert [one[f"refused{step}"].item() for step in range(STEPS)] == [0, 1, 0]
        for values in (one, *two):
            del values["loss1"], values["targets1"]
    assert_same(two[0], two[1])
    assert_same(two[0], one, 1e-9)


def config() -> PretrainConfig:
    changes = {
        "optim.optimizer": "sgd",  # Adam would blow up the rounding of gradients that are 0
        "optim.lr": 5.0,
        "run.duration": "5 steps",
        "execution.log_every": "1 steps",
        "execution.checkpoint_every": "2 steps",
    }
    return demo().changed({**TINY_RUN, **changes})


def train_on_a_rank(_: Ranks, out: Path) -> float:
    return float(train(config(), images(), out, device=torch.device("cpu")).step)


def assert_same_run(one: Path, two: Path) -> None:
    for name in ("student", "teacher", "loss"):
        ours, theirs = (
            load_file(run / "checkpoints" / "step_00000005" / f"{name}.safetensors")
            for run in (two, one)
        )
        assert_same(ours, theirs, 1e-3)  # fp32: sums in another order


def rewound(run: Path, to: Path) -> Path:
    """A copy of a run as it was after its fourth step."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step_00000005")
    (to / "checkpoints" / "LAST").write_text("step_00000004")
    return to


def test_a_run_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """Also if the number of ranks changes when it is resumed."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(config(), images(), one, device=torch.device("cpu"))
    assert run(train_on_a_rank, 2, two, joined=False) == [5, 5]
    assert_same_run(one, two)
    fewer, more = rewound(two, tmp_path / "fewer"), rewound(one, tmp_path / "more")
    train(config(), images(), fewer, device=torch.device("cpu"))
    assert json.loads((fewer / "config.json").read_text())["micro_batch"] == 2  # memory stays
    assert_same_run(one, fewer)
    assert run(train_on_a_rank, 2, more, joined=False) == [5, 5]
    assert_same_run(one, more)
    lines = [
        (tmp_path / world / "metrics.jsonl").read_text().splitlines() for world in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) == 5


class Counted:
    """Labelled images that count how often each is read."""

    classes = ("even", "odd")
    targets = (0, 1) * 6 + (0,)

    def __init__(self) -> None:
        self.reads = [0] * len(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads[index] += 1
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 20, 20), dtype=torch.uint8, generator=generator)


def pretrain_on_a_rank(_: Ranks, out: Path) -> list[int]:
    """How often the comparison after the training reads each image."""
    dataset, train_only = Counted(), pretraining.train

    def count_from_here(*arguments: Any, **options: Any) -> Any:
        result = train_only(*arguments, **options)
        dataset.reads = [0] * len(dataset)
        return result

    settings = {**TINY_RUN, "run.duration": "2 steps", "execution.knn_every": "0 steps"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "train", count_from_here)
        pretraining.pretrain("demo", data=dataset, out=out, device="cpu", settings=settings)
    return dataset.reads


def test_ranks_share_the_comparison_after_a_run(tmp_path: Path) -> None:
    networks = 3  # trained, untrained, raw pixels
    assert pretrain_on_a_rank(Ranks(), tmp_path / "one") == [networks] * 13
    first, second = run(pretrain_on_a_rank, 2, tmp_path / "two", joined=False)
    assert first == [networks] * 6 + [0] * 7
    assert second == [0] * 6 + [networks] * 7
    one, two = (
        json.loads((tmp_path / out / "results.json").read_text())["knn"] for out in ("one", "two")
    )
    assert two == {**one, "trained": two["trained"]}
    assert two["trained"] == pytest.approx(one["trained"], abs=100 / 13 + 0.1)  # rounding


def collectives(ranks: Ranks) -> tuple[float, list[int]]:
    total = runtime.all_sum(torch.tensor([float(ranks.rank + 1)]))
    runtime.barrier()
    return total.item(), runtime.gather_objects(ranks.rank)


def test_collectives_reach_all_ranks_and_need_no_group_alone() -> None:
    assert run(collectives, 2) == [(3.0, [0, 1])] * 2
    assert collectives(Ranks()) == (1.0, [0])
    assert not torch.distributed.is_initialized()
