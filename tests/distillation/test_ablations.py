"""Every switch of the paper's ablations, through optimizer steps, against `oracle.ablations`."""

from __future__ import annotations

import copy
import math
from functools import partial
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

from dino.distillation.collapse import CollapseMonitor
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering, KeyQueue, SinkhornKnopp, Targets
from dino.files import UserError

STEPS = 5
UNIT = partial(Targets, unit=True)
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
        expected_state = theirs.state_dict()
        for name, tensor in own.state_dict().items():  # a bias before batch norm stays near 0
            other = expected_state[name]
            scale = max(other.abs().max().item(), 1e-4)
            assert (tensor - other).abs().max().item() <= 1e-9 * scale, name
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


BYOL_HEAD: dict[str, Any] = {"bottleneck": None, "layers": 2, "batch_norm": True}
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy with predictor": {"predictor": True},
    "cross-entropy with predictor and batch norm": {
        "predictor": True,
        "head": {"batch_norm": True},
    },
    "mse with centering": {"kind": "mse", "targets": "centering"},
    "mse, plain head, predictor": {
        "kind": "mse",
        "targets": "none",
        "predictor": True,
        "head": {"bottleneck": None, "layers": 2},
    },
    "byol": {"kind": "mse", "targets": "none", "predictor": True, "head": BYOL_HEAD},
    "contrastive": {"kind": "contrastive", "temperature": 0.2},
    "moco": {
        "kind": "contrastive",
        "temperature": 0.2,
        "head": {"bottleneck": None, "batch_norm": True, "activation": "relu"},
    },
}


def with_loss(name: str, **options: Any) -> Distillation:
    """The `Distillation` of a row of `LOSSES`."""
    row = {**LOSSES[name], **options}
    if row.get("kind") == "contrastive":
        torch.manual_seed(5)
        row["targets"] = KeyQueue(20, PROTOTYPES)
    elif row.get("kind") == "mse":
        targets = row["targets"]
        row["targets"] = Centering(PROTOTYPES, unit=True) if targets == "centering" else UNIT()
    return distillation(**row)


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_predictors(name: str, local: int) -> None:
    row = LOSSES[name]
    norm = "batch_norm" in row.get("head", {})
    ours = with_loss(name, optimizer="sgd" if norm else "adamw")
    oracle = AblationOracle(
        copy.deepcopy(ours.student),
        PROTOTYPES,
        targets=row.get("targets", "centering" if row.get("kind") is None else "none"),
        loss=row.get("kind", "cross_entropy"),
        queue=ours.targets.negatives.clone() if isinstance(ours.targets, KeyQueue) else None,
        sgd=norm,
    )
    assert_steps_equal(ours, oracle, local=local)
    if isinstance(ours.targets, KeyQueue):
        assert oracle.queue is not None
        torch.testing.assert_close(ours.targets.negatives, oracle.queue, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mse with centering", "contrastive"])
def test_micro_batches_of_the_other_losses_change_nothing(name: str) -> None:
    whole = with_loss(name, streamed=False, drop_path=0.3)
    parts = with_loss(name, micro_batch=3, drop_path=0.3)
    for step in range(3):
        a, b = whole.step(groups(step), step), parts.step(groups(step), step)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-11)
        assert a.target_spread.item() == pytest.approx(b.target_spread.item(), rel=1e-9)
    assert_same(state(parts), state(whole), 1e-7)


def test_batch_norm_of_a_predictor_needs_all_images_and_all_views() -> None:
    head: dict[str, Any] = {"batch_norm": True}
    assert not distillation(predictor=True, head=head).streamed
    assert distillation(predictor=True).streamed
    with pytest.raises(UserError, match="batch norm needs all images of a step at once"):
        distillation(predictor=True, head=head, micro_batch=2)


def test_the_teacher_has_no_predictor() -> None:
    ours = with_loss("byol")
    names = ours.student.state_dict().keys() - ours.teacher.state_dict().keys()
    assert names
    assert all(name.startswith("predictor.") for name in names)
    before = copy.deepcopy(ours.student.state_dict())
    ours.step(groups(0), 1)
    changed = ours.student.state_dict()
    assert all(not torch.equal(changed[name], before[name]) for name in names)


def test_a_refused_step_leaves_the_queue() -> None:
    ours = with_loss("contrastive")
    ours.step(groups(0), 0)
    before = state(ours)
    views = groups(1)
    views[0][0, 2, 0, 0, 0] = float("nan")
    assert ours.step(views, 1).found_inf.item()
    assert_same(state(ours), before)


def test_the_spread_of_targets_is_0_if_all_are_equal() -> None:
    ours = with_loss("mse with centering", targets="none")
    views = [torch.zeros(2, 4, 3, 16, 16, dtype=torch.float64)]
    assert ours.step(views, 0).target_spread.item() == pytest.approx(0, abs=1e-12)
    report = ours.step(groups(0), 1)
    assert 0 < report.target_spread.item() < 1
    assert math.isnan(report.teacher_entropy.item())
    assert math.isnan(distillation().step(groups(0), 0).target_spread.item())
    with pytest.raises(UserError, match="the loss mse compares vectors of length 1"):
        distillation(kind="mse")


def test_a_constant_output_is_reported_by_its_name() -> None:
    monitor = CollapseMonitor(24, patience=3)
    advice = [monitor.update(math.nan, math.nan, 1e-4) for _ in range(4)]
    assert advice[:2] == [None, None]
    assert "constant output" in (advice[2] or "")
    assert monitor.collapse == "constant"
    monitor.update(math.nan, math.nan, 0.4)
    assert monitor.collapse is None


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
