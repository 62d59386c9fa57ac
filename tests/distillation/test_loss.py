"""The separable loss against naive loops, and what holds for every input."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from helpers.small import loss_of_logits
from hypothesis import given
from hypothesis import strategies as st
from oracle import dino as oracle
from torch import Tensor

from dino.distillation import loss as module
from dino.distillation.loss import num_pairs, prototype_cross_entropy
from dino.distillation.targets import Centering, entropy, targets_for_views

SIZES = {"views": st.integers(2, 6), "batch": st.integers(1, 4), "prototypes": st.integers(2, 9)}


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_papers_example() -> None:
    """The reference on numpy RandomState(0), S = randn(12,5), T = randn(6,5), c = .1 randn(1,5)."""
    import numpy as np

    random = np.random.RandomState(0)
    student, teacher, center = random.randn(12, 5), random.randn(6, 5), 0.1 * random.randn(1, 5)
    centering = Centering(5).double()
    centering.center.copy_(torch.from_numpy(center[0]))
    s, t = (
        torch.from_numpy(student).unflatten(0, (4, 3)),
        torch.from_numpy(teacher).unflatten(0, (2, 3)),
    )
    value = loss_of_logits(s, centering.targets(t, 0.04), 0.1)
    assert value.item() == pytest.approx(11.678675352907305, rel=1e-12)
    centering.update(t.sum(dim=(0, 1)), 6)
    assert centering.center.tolist() == pytest.approx(
        [
            -0.04127295151924888,
            0.09915406152079816,
            0.027010157979889336,
            -0.025218413832861025,
            0.08591601644876154,
        ],
        rel=1e-12,
    )


@given(**SIZES, tau_s=st.floats(0.05, 1), tau_t=st.floats(0.02, 0.1), seed=st.integers(0, 99))
def test_loss_and_gradient_equal_naive_loops(
    views: int, batch: int, prototypes: int, tau_s: float, tau_t: float, seed: int
) -> None:
    student = logits(seed, views, batch, prototypes).requires_grad_()
    teacher, center = logits(seed + 1, 2, batch, prototypes), logits(seed + 2, prototypes)
    centering = Centering(prototypes).double()
    centering.center.copy_(center)
    value = loss_of_logits(student, centering.targets(teacher, tau_t), tau_s)
    (gradient,) = torch.autograd.grad(value, student)
    expected = oracle.loss(list(student), list(teacher), center, tau_s, tau_t)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)


@given(
    views=st.integers(1, 4),
    batch=st.integers(1, 5),
    prototypes=st.integers(2, 9),
    seed=st.integers(0, 99),
    free=st.booleans(),
    common=st.booleans(),
    chunk=st.sampled_from([1, 7, 30, 2**24]),
    cached=st.sampled_from([1, 10, 2**18]),
)
def test_fused_prototypes_equal_materialised_logits(
    views: int,
    batch: int,
    prototypes: int,
    seed: int,
    free: bool,
    common: bool,
    chunk: int,
    cached: int,
) -> None:
    z, v = (
        logits(seed, views, batch, 4).requires_grad_(),
        logits(seed + 1, prototypes, 4).requires_grad_(),
    )
    g = logits(seed + 2, prototypes, 1).exp().requires_grad_(free)
    targets = logits(seed + 3, 1 if common else views, batch, prototypes).softmax(-1) * 2
    inputs = [z, v, g] if free else [z, v]
    with (
        mock.patch.object(module, "CHUNK_ELEMENTS", chunk),
        mock.patch.object(module, "CACHED_ELEMENTS", cached),
    ):
        value = prototype_cross_entropy(z, v, g, targets, 2, 0.1)
        gradients = torch.autograd.grad(3 * value, inputs)
    weight = g * v / v.norm(dim=1, keepdim=True)
    log_p = torch.log_softmax(z @ weight.T / 0.1, dim=-1)
    expected = -(targets * log_p).sum()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], requires_grad=True)
    value = loss_of_logits(student, Centering(3).targets(student, 0.04), 0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]
    assert value.item() == pytest.approx(2e5)


def test_the_targets_of_a_view_are_those_of_the_other_teacher_views() -> None:
    targets = logits(0, 2, 3, 4).softmax(-1)
    others, count = targets_for_views(targets, 0)
    assert count == 1
    assert torch.equal(others, targets.flip(0))
    common, count = targets_for_views(targets, 2)
    assert count == 2
    torch.testing.assert_close(common, targets.sum(0, keepdim=True))
    assert [num_pairs(2, n + 2) for n in (10, 8, 6, 0)] == [22, 18, 14, 2]


def test_targets_are_centered_sharpened_and_detached() -> None:
    centering = Centering(5).double()
    centering.center.copy_(logits(1, 5))
    teacher = logits(0, 2, 3, 5).requires_grad_()
    targets = centering.targets(teacher, 0.04)
    assert not targets.requires_grad
    torch.testing.assert_close(targets, ((teacher - centering.center) / 0.04).softmax(-1))
    assert teacher.grad is None


def test_the_center_is_a_buffer_and_does_not_change_where_found_inf() -> None:
    centering = Centering(3)
    assert "center" in centering.state_dict()
    centering.update(torch.full((3,), float("nan")), 2, torch.tensor(True))
    assert centering.center.tolist() == [0, 0, 0]
    centering.update(torch.tensor([2.0, 4.0, 6.0]), 2, torch.tensor(False))
    assert centering.center.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_entropy_of_certain_and_uniform_targets() -> None:
    assert entropy(torch.eye(4)).item() == 0
    assert entropy(torch.full((2, 3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
