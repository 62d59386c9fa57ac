"""Every switch of the paper's ablations, through optimizer steps, against `oracle.ablations`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.small import (
    PROTOTYPES,
    assert_same,
    distillation,
    groups,
    schedules,
    state,
)
from oracle.ablations import AblationOracle, batch_softmax

from dino.distillation.step import Distillation
from dino.distillation.targets import Centering, SinkhornKnopp, Targets
from dino.files import UserError

STEPS = 5
TARGETS: dict[str, Any] = {
    "centering": lambda: Centering(PROTOTYPES),
    "sinkhorn": SinkhornKnopp,
    "batch_softmax": lambda: SinkhornKnopp(iterations=1),
    "none": Targets,
}


def assert_steps_equal(ours: Distillation, oracle: AblationOracle, **views: int) -> None:
    """Losses, student, teacher and center after some steps."""
    planned = ours.schedules
    for step in range(STEPS):
        batch = groups(step, **views)
        value = ours.step(batch, step).loss.item()
        expected = oracle.step(
            [view for group in batch for view in group],
            lr=planned.lr_at(step),
            wd=planned.weight_decay_at(step),
            lam=planned.momentum_at(step),
            tau_t=planned.temperature_at(step),
            tau_s=ours.loss.temperature,
        )
        assert value == pytest.approx(expected, rel=1e-9)
    for own, theirs in ((ours.student, oracle.student), (ours.teacher, oracle.teacher)):
        assert_same(own.state_dict(), theirs.state_dict(), 1e-8)
    if isinstance(ours.targets, Centering):
        torch.testing.assert_close(ours.targets.center, oracle.center, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("name", TARGETS)
def test_operations_on_targets(name: str, local: int) -> None:
    ours = distillation(targets=TARGETS[name]())
    oracle = AblationOracle(copy.deepcopy(ours.student), PROTOTYPES, targets=name)
    assert_steps_equal(ours, oracle, local=local)


@pytest.mark.parametrize(
    "kind", ["momentum", "previous_iteration", "previous_epoch", "student_copy"]
)
def test_teachers(kind: Any) -> None:
    ours = distillation(planned=schedules(teacher=kind, steps_per_epoch=2))
    oracle = AblationOracle(copy.deepcopy(ours.student), PROTOTYPES, teacher=kind, epoch=2)
    assert_steps_equal(ours, oracle)


def test_teachers_are_the_student_of_their_time_bit_for_bit() -> None:
    students: list[dict[str, Any]] = []
    for kind, behind in (("student_copy", 0), ("previous_iteration", 1), ("previous_epoch", 1)):
        ours = distillation(planned=schedules(teacher=kind, steps_per_epoch=2, warmup=0))
        students = [copy.deepcopy(ours.student.state_dict())]
        for step in range(3):  # the second epoch of two steps is not over
            ours.step(groups(step), step)
            students.append(copy.deepcopy(ours.student.state_dict()))
        assert_same(ours.teacher.state_dict(), students[3 - behind])


@pytest.mark.parametrize("kind", ["previous_iteration", "previous_epoch", "student_copy"])
def test_a_refused_step_leaves_every_teacher(kind: Any) -> None:
    ours = distillation(planned=schedules(teacher=kind, steps_per_epoch=2, warmup=0))
    for step in range(3):
        ours.step(groups(step), step)
    before = state(ours)
    views = groups(9)
    views[1][0, 2, 0, 0, 0] = float("nan")
    assert ours.step(views, 3).found_inf.item()
    assert_same(state(ours), before)


def test_targets_at_temperature_0_are_the_largest_logit() -> None:
    planned = schedules(temperature_start=0.0, temperature=0.0)
    for name in ("centering", "none"):
        ours = distillation(planned=planned, targets=TARGETS[name]())
        oracle = AblationOracle(copy.deepcopy(ours.student), PROTOTYPES, targets=name)
        assert_steps_equal(ours, oracle)
        assert ours.step(groups(9), STEPS).teacher_entropy.item() == 0


def test_sinkhorn_of_large_logits_is_finite_and_rows_sum_to_1() -> None:
    logits = 1e4 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    for iterations in (1, 3):
        found = SinkhornKnopp(iterations).targets(logits, 0.04)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 6))
    many = SinkhornKnopp(200).targets(torch.randn(2, 5, 10), 1.0)
    torch.testing.assert_close(many.sum(dim=(0, 1)), torch.ones(10))  # every prototype as often


def test_the_softmax_over_the_batch_is_one_iteration() -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    found = SinkhornKnopp(1).targets(logits, 0.3)
    torch.testing.assert_close(found.flatten(0, 1), batch_softmax(logits.flatten(0, 1), 0.3))


def test_an_operation_over_the_batch_refuses_micro_batches() -> None:
    with pytest.raises(UserError, match=r"over the batch .* needs all images of a step at once"):
        distillation(targets=SinkhornKnopp(), micro_batch=2)


@pytest.mark.parametrize("name", ["none", "centering"])
def test_targets_are_left_as_they_were(name: str) -> None:
    """The logits that a caller keeps are not overwritten."""
    logits = torch.randn(2, 3, PROTOTYPES)
    before = logits.clone()
    TARGETS[name]().targets(logits, 0.1)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", TARGETS)
def test_streaming_changes_nothing(name: str) -> None:
    streamed, whole = (
        distillation(targets=TARGETS[name](), drop_path=0.3, streamed=on) for on in (True, False)
    )
    for step in range(3):
        a, b = streamed.step(groups(step), step), whole.step(groups(step), step)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-11)
    assert_same(state(streamed), state(whole), 1e-7)
