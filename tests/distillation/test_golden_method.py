"""Loss, schedules and a whole training trajectory against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_set import (
    assert_agree,
    golden_centering,
    golden_distillation,
    golden_steps,
    manifest,
    part,
    read,
    tensors,
)
from helpers.small import loss_of_logits

from dino.distillation.loss import num_pairs, prototype_cross_entropy
from dino.distillation.schedules import cosine
from dino.distillation.targets import targets_for_views

TRAINING = manifest()["training"]
LOSS_EPOCHS = sorted({int(k[5:].split(".")[0]) for k in tensors("loss.safetensors")})


@pytest.mark.parametrize("epoch", LOSS_EPOCHS)
def test_golden_loss_and_center(epoch: int) -> None:
    golden = part(tensors("loss.safetensors"), f"epoch{epoch}.")
    centering = golden_centering(golden["center_before"])
    teacher = golden["teacher"].unflatten(0, (2, -1))
    student = golden["student"].clone().requires_grad_()
    targets = centering.targets(teacher, golden["teacher_temp"].item())
    views = student.unflatten(0, (-1, teacher.shape[1]))
    value = loss_of_logits(views, targets, TRAINING["student_temp"])
    value.backward()
    assert_agree(value[None], golden["loss"])
    assert student.grad is not None
    assert_agree(student.grad, golden["grad_student"])
    centering.update(golden["teacher"].sum(dim=0), len(golden["teacher"]))
    assert_agree(centering.center[None], golden["center_after"])


@pytest.mark.parametrize("epoch", LOSS_EPOCHS)
def test_golden_loss_streamed_view_by_view_and_row_by_row(epoch: int) -> None:
    golden = part(tensors("loss.safetensors"), f"epoch{epoch}.")
    centering = golden_centering(golden["center_before"])
    teacher = golden["teacher"].unflatten(0, (2, -1))
    targets = centering.targets(teacher, golden["teacher_temp"].item())
    student = golden["student"].unflatten(0, (-1, teacher.shape[1]))
    total, gradients = torch.zeros((), dtype=torch.float64), torch.zeros_like(student)
    identity = torch.eye(student.shape[-1], dtype=torch.float64)
    for view in range(len(student)):
        for row in range(student.shape[1]):
            logits = student[None, view, row : row + 1].clone().requires_grad_()
            summed, count = targets_for_views(targets, min(view, 2) if view >= 2 else 0)
            target = summed[view : view + 1] if len(summed) > 1 else summed
            term = prototype_cross_entropy(
                logits, identity, None, target[:, row : row + 1], count, TRAINING["student_temp"]
            ) / (num_pairs(2, len(student)) * student.shape[1])
            term.backward()
            assert logits.grad is not None
            total += term.detach()
            gradients[view, row] = logits.grad[0, 0]
    assert_agree(total[None], golden["loss"])
    assert_agree(gradients.flatten(0, 1), golden["grad_student"])


@pytest.mark.parametrize("name", sorted(read("schedules.json")))
def test_golden_schedules(name: str) -> None:
    golden = read("schedules.json")[name]
    per_epoch = golden["steps_per_epoch"]
    total, warmup = golden["epochs"] * per_epoch, golden["warmup_epochs"] * per_epoch
    ours = [cosine(i, golden["base"], golden["final"], total, warmup) for i in range(total)]
    assert len(ours) == len(golden["values"])
    assert ours == pytest.approx(golden["values"], rel=1e-9, abs=0)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_golden_training(micro_batch: int | None, streamed: bool) -> None:
    golden = tensors("training.safetensors")
    distillation = golden_distillation(golden, micro_batch, streamed)
    losses = [
        distillation.step(groups, step).loss.item()
        for step, groups in enumerate(golden_steps(golden))
    ]
    assert losses == pytest.approx(TRAINING["losses"], rel=1e-9, abs=0)
    for network, prefix in ((distillation.student, "student"), (distillation.teacher, "teacher")):
        expected = part(golden, f"final.{prefix}.")
        ours = network.state_dict()
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            assert_agree(value, expected[name])
    assert_agree(distillation.targets.center[None], golden["final.center"])
