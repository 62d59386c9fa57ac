"""KoLeo against its definition, and as a term of the loss."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.small import assert_same, distillation, groups, network, state
from torch import Tensor

from dino.distillation.loss import StudentLoss, koleo
from dino.files import UserError


def oracle(features: Tensor) -> float:
    """The mean of -log of the distance to the nearest other feature of the view."""
    total, count = 0.0, 0
    for view in features:
        rows = [row / row.norm() for row in view]
        for i, row in enumerate(rows):
            total -= math.log(min(float((row - x).norm()) for j, x in enumerate(rows) if j != i))
            count += 1
    return total / count


def test_koleo_is_its_definition() -> None:
    features = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert koleo(features).item() == pytest.approx(oracle(features), rel=1e-6)


def test_koleo_moves_neighbours_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    features = (1 + 0.1 * torch.randn(1, 16, 4, generator=generator)).requires_grad_()
    before = koleo(features).item()
    (gradient,) = torch.autograd.grad(koleo(features), features)
    assert koleo(features - 0.01 * gradient).item() < before


def test_equal_features_have_a_finite_gradient() -> None:
    features = torch.ones(1, 4, 3, requires_grad=True)
    value = koleo(features)
    value.backward()
    assert torch.isfinite(value)
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_the_term_is_of_the_global_views_only() -> None:
    """Of the first group, whether groups are streamed or not."""
    reports = {}
    for streamed in (True, False):
        ours = distillation(koleo=0.3, streamed=streamed)
        expected = oracle(ours.student.features(groups(0)[0]).detach())
        report = ours.step(groups(0), 0)
        assert report.terms["koleo"].item() == pytest.approx(0.3 * expected, rel=1e-6)
        assert report.loss == report.terms["cross_entropy"] + report.terms["koleo"]
        reports[streamed] = state(ours)
    assert_same(reports[True], reports[False], 1e-9)
    without = distillation()
    assert list(without.step(groups(0), 0).terms) == ["cross_entropy"]


def test_micro_batches_are_refused() -> None:
    loss = StudentLoss(network(), koleo=0.1)
    assert loss.needs_full_batch == "KoLeo"
    with pytest.raises(UserError, match="KoLeo needs all images of a step at once"):
        distillation(koleo=0.1, micro_batch=2)
    assert StudentLoss(network()).needs_full_batch == ""
