"""Schedules, parameter groups, optimizers, clipping, EMA and the health monitor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.small import distillation, network, schedules
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dino.distillation.collapse import CollapseMonitor, effective_rank, feature_spread
from dino.distillation.optimizer import LARS, clip_per_tensor, parameter_groups, step_unless
from dino.distillation.schedules import cosine, in_steps, ramp
from dino.distillation.teacher import Teacher
from dino.files import UserError


# ------------------------------------------------------------------------------- schedules
def test_schedules_reproduce_published_logs() -> None:
    """Epoch means of a published run's log."""
    steps, total = 2502, 250200
    for epoch, lr, decay, momentum in (
        (0, 4.99820136696111e-05, 0.04002958960483862, 0.9960003287733872),
        (10, 0.000999898629378598, 0.04971127240897113, 0.9961079030267663),
        (49, 0.0005958076746498748, 0.21717166926781103, 0.9979685741029758),
        (99, 1.1014922368712134e-06, 0.3999703748959071, 0.9999996708321766),
    ):
        span = range(epoch * steps, (epoch + 1) * steps)
        mean = np.mean([cosine(i, 0.001, 1e-6, total, 10 * steps) for i in span])
        assert mean == pytest.approx(lr, rel=1e-9)
        assert np.mean([cosine(i, 0.04, 0.4, total) for i in span]) == pytest.approx(
            decay, rel=1e-9
        )
        ours = np.mean([cosine(i, 0.996, 1.0, total) for i in span])
        assert ours == pytest.approx(momentum, rel=1e-12)


def test_warm_up_includes_its_end_point() -> None:
    """The published schedule of 5 epochs of 4 steps, 2 of warm-up, from 1 to .1."""
    values = [cosine(i, 1, 0.1, 20, 8) for i in range(20)]
    assert values[0] == 0
    assert values[7] == values[8] == 1
    assert values[9] == pytest.approx(0.9846666218)
    assert values[-1] == pytest.approx(0.1153333782)
    assert cosine(0, 1, 0.1, 20, 1) == 0


def test_teacher_temperature_changes_once_an_epoch() -> None:
    """Recipe vit_s16: .04 -> .07 in 30 epochs."""
    expected = {0: 0.04, 1: 0.041034, 2: 0.042069, 15: 0.055517, 28: 0.068966, 29: 0.07, 30: 0.07}
    for epoch, value in expected.items():
        assert ramp(epoch, 0.04, 0.07, 30) == pytest.approx(value, abs=1e-6)
    assert ramp(0, 0.04, 0.07, 0) == 0.07
    planned = schedules(steps_per_epoch=5, temperature_epochs=2)
    values = [planned.temperature_at(step) for step in range(15)]
    assert values == [0.04] * 5 + [0.07] * 10


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("100 epochs", 700),
        ("1 epoch", 7),
        ("0.5 epochs", 4),
        ("30 steps", 30),
        ("10%", 20),
        ("12.5 percent", 25),
    ],
)
def test_durations(text: str, steps: int) -> None:
    assert in_steps(text, 7, 200) == steps


@pytest.mark.parametrize("text", ["", "ten epochs", "5", "5 minutes", "-1 steps", "1e3 steps"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is not a duration"):
        in_steps(text, 7, 200)
    with pytest.raises(UserError, match="epochs or steps"):
        in_steps("10%", 7)


# ------------------------------------------------------------------------------- optimizer
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    module = network(fixed_norm=False)
    decayed, plain = parameter_groups(module)
    names = {id(p): n for n, p in module.named_parameters()}
    in_groups = [names[id(p)] for group in (decayed, plain) for p in group["params"]]
    assert sorted(in_groups) == sorted(names.values())
    assert {names[id(p)] for p in plain["params"]} == {
        n for n, p in module.named_parameters() if p.ndim == 1 or n.endswith(".bias")
    }
    quirks = {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_g"}
    assert quirks <= {names[id(p)] for p in decayed["params"]}
    fixed = network(fixed_norm=True)
    assert all(p.requires_grad for group in parameter_groups(fixed) for p in group["params"])


def test_clipping_is_per_tensor() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)]
    assert not clip_per_tensor(gradients, 1.0).item()
    torch.testing.assert_close(gradients[0], torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert gradients[1].tolist() == pytest.approx([0.3, 0.4])
    assert gradients[2].tolist() == [0, 0]
    untouched = [torch.tensor([3.0, 4.0])]
    assert not clip_per_tensor(untouched, 0.0).item()
    assert untouched[0].tolist() == [3, 4]
    assert clip_per_tensor([torch.tensor([1.0]), torch.tensor([float("nan")])], 1.0).item()


def test_lars_against_its_formula() -> None:
    """As the docstring of `LARS` gives it."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = LARS(parameter_groups(layer))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    mu_w, mu_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(4):
        layer.weight.grad, layer.bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.5, 0.1 if group["decayed"] else 0.0
        step_unless(torch.tensor(step == 2), optimizer)
        if step == 2:
            continue
        g = layer.weight.grad + 0.1 * weight
        mu_w = 0.9 * mu_w + g * 0.001 * weight.norm() / g.norm()
        mu_b = 0.9 * mu_b + layer.bias.grad
        weight, bias = weight - 0.5 * mu_w, bias - 0.5 * mu_b
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


@given(momentum=st.floats(0, 1))
def test_the_teacher_averages_parameters_not_buffers(momentum: float) -> None:
    student = network(batch_norm=True)
    teacher = Teacher(student, lambda step: momentum if step == 7 else 0.5)
    norms = [
        next(m for m in n.modules() if isinstance(m, nn.BatchNorm1d)) for n in (teacher, student)
    ]
    nn.init.constant_(norms[1].weight, 3.0)
    norms[1].running_mean.fill_(7)  # type: ignore[union-attr]
    teacher.update(student, 7)
    assert norms[0].weight.tolist() == pytest.approx([momentum + 3 * (1 - momentum)] * 32)
    assert norms[0].running_mean.eq(0).all()  # type: ignore[union-attr]
    before = norms[0].weight.clone()
    teacher.update(student, 7, torch.tensor(True))
    assert torch.equal(norms[0].weight, before)


# ------------------------------------------------------------------------------- health
def test_spread_and_rank_of_known_features() -> None:
    torch.manual_seed(0)
    sphere = torch.randn(4000, 32)
    assert feature_spread(sphere).item() == pytest.approx(1.0, abs=0.02)
    assert effective_rank(sphere).item() == pytest.approx(32, abs=0.5)
    assert feature_spread(torch.ones(10, 32)).item() == pytest.approx(0, abs=1e-5)
    assert feature_spread(torch.randn(1, 32)).item() == 0
    line = torch.randn(100, 1) * torch.ones(1, 8)
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("entropy", "name"), [(math.log(64), "uniform"), (0.0, "one prototype")])
def test_a_collapse_is_reported_once_by_its_name_after_patience(entropy: float, name: str) -> None:
    monitor = CollapseMonitor(64, patience=5)
    advice = [monitor.update(entropy, 1e-4) for _ in range(12)]
    assert advice[:4] == [None] * 4
    assert advice[4] is not None
    assert name in advice[4]
    assert advice[5:] == [None] * 7
    monitor.update(2.0, 0.5)  # it recovers, then falls again
    assert sum(monitor.update(entropy, 1e-4) is not None for _ in range(5)) == 1


def test_low_entropy_with_information_is_no_collapse() -> None:
    monitor = CollapseMonitor(64, patience=2)
    assert [monitor.update(0.01, 1.5) for _ in range(9)] == [None] * 9
    assert [monitor.update(4.1, 0.5) for _ in range(9)] == [None] * 9


def run_to_collapse(center_momentum: float, temperature: float) -> str | None:
    planned = schedules(
        total=400,
        lr=0.02,
        lr_end=0.02,
        momentum=0.9,
        momentum_end=0.9,
        temperature_start=temperature,
        temperature=temperature,
    )
    ours = distillation(planned=planned, dtype=torch.float32)
    ours.targets.momentum = center_momentum
    monitor = CollapseMonitor(24, patience=20)
    images = torch.randn(4, 1, 3, 1, 1) + 0.1 * torch.randn(4, 1, 3, 16, 16)
    for step in range(planned.total):
        noise = 0.1 * torch.randn(2, 4, 3, 16, 16)
        report = ours.step([images.squeeze(1)[None] + noise], step)
        entropy = report.teacher_entropy.item()
        if monitor.update(entropy, report.loss.item() - entropy):
            return monitor.collapse
    return None


def test_real_collapses_are_recognised() -> None:
    """Section 5.3: without centering one prototype wins, without sharpening the uniform target."""
    assert run_to_collapse(center_momentum=1.0, temperature=0.04) == "one prototype"
    assert run_to_collapse(center_momentum=0.9, temperature=0.5) == "uniform"


@pytest.mark.parametrize("name", ["lr", "weight_decay_end", "momentum", "temperature"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_schedule_that_is_not_finite_is_refused(name: str, value: float) -> None:
    """Such a learning rate would poison the weights in a step whose gradients are finite."""
    with pytest.raises(UserError, match=f"{name} is {value}"):
        schedules(**{name: value})
