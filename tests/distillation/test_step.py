"""One step of training: against an oracle, and invariant to how it is carried out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.small import assert_same, distillation, groups, network, schedules, state
from oracle.dino import Oracle

from dino.distillation.loss import StudentLoss
from dino.distillation.network import Network
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering
from dino.files import UserError
from dino.models.convnet import ResNet
from dino.models.head import Head
from dino.runtime import Ranks


@pytest.mark.parametrize("local", [0, 1, 3])
@pytest.mark.parametrize("head", [{"fixed_norm": True}, {"fixed_norm": False}])
@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_steps_equal_the_oracle(local: int, head: dict[str, Any], clip: float) -> None:
    planned = schedules(freeze_steps=2)
    ours = distillation(planned=planned, head=head, clip=clip)
    oracle = Oracle(copy.deepcopy(ours.student), 24)
    for step in range(5):
        views = groups(step, local=local)
        value = ours.step(views, step).loss.item()
        expected = oracle.step(
            [view for group in views for view in group],
            lr=planned.lr_at(step),
            wd=planned.weight_decay_at(step),
            lam=planned.momentum_at(step),
            tau_t=planned.temperature_at(step),
            clip=clip,
            frozen=step < 2,
        )
        assert value == pytest.approx(expected, rel=1e-10)
    for own, theirs in ((ours.student, oracle.student), (ours.teacher, oracle.teacher)):
        assert_same(own.state_dict(), theirs.state_dict(), 1e-8)
    torch.testing.assert_close(ours.targets.center, oracle.center, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("streamed", [True, False])
def test_micro_batches_and_streaming_change_nothing(micro_batch: int, streamed: bool) -> None:
    options: dict[str, Any] = {"drop_path": 0.3, "clip": 0.1, "head": {"fixed_norm": False}}
    whole = distillation(**options, streamed=False)
    parts = distillation(**options, micro_batch=micro_batch, streamed=streamed)
    for step in range(3):
        a, b = whole.step(groups(step), step), parts.step(groups(step), step)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-11)
        assert a.teacher_entropy.item() == pytest.approx(b.teacher_entropy.item(), rel=1e-11)
        torch.testing.assert_close(a.features, b.features)
    assert_same(state(parts), state(whole), 1e-7)


def test_drop_path_acts_on_the_student_and_is_drawn_anew_each_step() -> None:

    other = distillation(drop_path=0.0)
    same = groups(0)
    again = distillation(drop_path=0.5)
    assert again.step(same, 0).loss.item() == distillation(drop_path=0.5).step(same, 0).loss.item()
    assert again.step(same, 0).loss.item() != other.step(same, 0).loss.item()
    first = distillation(drop_path=0.5)._drop_path_scales(5, 4, 0)
    second = distillation(drop_path=0.5)._drop_path_scales(5, 4, 1)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert (first[:2] == 1).all()  # block 0 drops nothing
    assert set(first[2:].unique().tolist()) <= {0.0, 2.0}


def test_drop_path_of_two_ranks_is_that_of_one() -> None:
    whole = distillation(drop_path=0.5)._drop_path_scales(5, 6, 3)
    halves = [
        distillation(drop_path=0.5, ranks=Ranks(rank, 2, rank))._drop_path_scales(5, 3, 3)
        for rank in range(2)
    ]
    assert whole is not None
    assert torch.equal(torch.cat([h for h in halves if h is not None], dim=2), whole)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, poison: float) -> None:
    ours = distillation(optimizer=optimizer, clip=1.0)
    for step in range(3):
        assert not ours.step(groups(step), step).found_inf.item()
    before = state(ours)
    views = groups(9)
    views[1][0, 2, 0, 0, 0] = poison
    assert ours.step(views, 3).found_inf.item()
    views = groups(9)
    views[0][1, 2, 0, 0, 0] = poison  # also in a view of the teacher
    assert ours.step(views, 3).found_inf.item()
    assert_same(state(ours), before)
    assert not ours.step(groups(3), 3).found_inf.item()
    clean = distillation(optimizer=optimizer, clip=1.0)
    for step in range(4):
        clean.step(groups(step), step)
    assert_same(state(ours), state(clean))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_frozen_last_layer_has_no_update_no_decay_and_no_moments(optimizer: str) -> None:
    ours = distillation(
        planned=schedules(freeze_steps=3), head={"fixed_norm": False}, optimizer=optimizer
    )
    before = copy.deepcopy(ours.student.head.last_layer.state_dict())
    mlp = ours.student.head.mlp[0].weight.clone()
    for step in range(3):
        ours.step(groups(step), step)
    assert_same(ours.student.head.last_layer.state_dict(), before)
    for own, origin in zip(
        ours.teacher.head.last_layer.state_dict().values(), before.values(), strict=True
    ):
        torch.testing.assert_close(own, origin, rtol=1e-14, atol=1e-15)
    for parameter in ours.student.head.last_layer.parameters():
        moments = ours.optimizer.state.get(parameter, {})
        assert not any(moment.any() for moment in moments.values())
    assert not torch.equal(ours.student.head.mlp[0].weight, mlp)
    ours.step(groups(3), 3)
    assert not torch.equal(ours.student.head.last_layer.weight_v, before["weight_v"])
    assert not torch.equal(ours.student.head.last_layer.weight_g, before["weight_g"])


def test_teacher_shares_no_storage_and_has_no_gradient() -> None:
    ours = distillation()
    theirs = {p.untyped_storage().data_ptr() for p in ours.student.parameters()}
    for parameter in ours.teacher.parameters():
        assert parameter.untyped_storage().data_ptr() not in theirs
        assert not parameter.requires_grad


def test_center_is_the_mean_over_rows_on_one_process() -> None:
    ours = distillation()
    views = groups(0)
    with torch.no_grad():
        _, logits = ours.teacher(views[0])
    ours.step(views, 0)
    torch.testing.assert_close(ours.targets.center, 0.1 * logits.mean(dim=(0, 1)))


def batch_norm_distillation(streamed: bool) -> Distillation:
    torch.manual_seed(0)
    student = Network(
        ResNet("resnet18", image_size=32), Head(512, 16, hidden=8, bottleneck=4, batch_norm=True)
    )
    return Distillation(
        StudentLoss(student), Centering(16), schedules(), optimizer="lars", streamed=streamed
    )


def test_a_head_with_batch_norm_processes_all_views_in_one_batch() -> None:
    views = [torch.randn(2, 3, 3, 32, 32), torch.randn(2, 3, 3, 32, 32)]
    streamed, whole = batch_norm_distillation(True), batch_norm_distillation(False)
    assert not streamed.streamed
    for step in range(2):
        assert streamed.step(views, step).loss.item() == whole.step(views, step).loss.item()
    assert_same(state(streamed), state(whole))
    head = streamed.student.head
    assert isinstance(head.mlp[1], torch.nn.BatchNorm1d)
    assert head.mlp[1].num_batches_tracked == 2  # one pass a step, not one a group
    teacher = streamed.teacher.backbone.network.bn1
    assert teacher.num_batches_tracked == 2  # it has running statistics of its own
    assert not torch.equal(teacher.running_mean, streamed.student.backbone.network.bn1.running_mean)


def test_what_cannot_be_is_refused() -> None:
    student = Network(ResNet("resnet18"), Head(512, 16, hidden=8, bottleneck=4))
    with pytest.raises(UserError, match="needs all images of a step at once"):
        Distillation(StudentLoss(student), Centering(16), schedules(), micro_batch=1)
    with pytest.raises(UserError, match="drop path"):
        Distillation(StudentLoss(student), Centering(16), schedules(), drop_path=0.1)


def test_bf16_keeps_head_loss_and_center_in_full_precision() -> None:
    ours = distillation(dtype=torch.float32, precision="bf16")
    report = ours.step(groups(0, dtype=torch.float32), 5)
    assert report.loss.dtype == ours.targets.center.dtype == report.features.dtype == torch.float32
    exact = distillation(dtype=torch.float32)
    assert report.loss.item() == pytest.approx(
        exact.step(groups(0, dtype=torch.float32), 5).loss.item(), rel=1e-2
    )


def test_the_initial_network_is_the_student() -> None:
    assert_same(network(0).state_dict(), distillation(0).teacher.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_frozen_backbone_does_not_move_and_the_head_gets_the_same_gradients(
    optimizer: Any,
) -> None:
    planned = schedules(warmup=0, backbone_freeze_steps=2)
    options: dict[str, Any] = {"optimizer": optimizer, "drop_path": 0.3, "clip": 0.1}
    ours = distillation(planned=planned, **options)
    free = distillation(planned=schedules(warmup=0), **options)
    before = copy.deepcopy(ours.student.state_dict())
    free.step(groups(0), 0)
    for step in range(2):
        ours.step(groups(step), step)
        if step == 0:
            for own, theirs in zip(
                ours.student.head.parameters(), free.student.head.parameters(), strict=True
            ):
                assert (own.grad is None) == (theirs.grad is None)
                if own.grad is not None and theirs.grad is not None:
                    torch.testing.assert_close(own.grad, theirs.grad)
        for name, value in ours.student.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == (name.startswith("backbone.") or name.endswith("weight_g")), name
        assert_same(ours.teacher.backbone.state_dict(), ours.student.backbone.state_dict())
    moments = [ours.optimizer.state.get(p) for p in ours.student.backbone.parameters()]
    assert optimizer == "sgd" or moments == [None] * len(moments)
    ours.step(groups(2), 2)
    assert not torch.equal(
        ours.student.state_dict()["backbone.cls_token"], before["backbone.cls_token"]
    )
