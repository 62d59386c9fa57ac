"""Whitening: of the images it was learned from, of few images, and of equal images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dino.features import whitening
from dino.features.whitening import FLOOR, Whitening


def skewed(count: int = 300, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 3


def test_centred_whitening_whitens_the_images_it_was_learned_from() -> None:
    features = skewed()
    white = Whitening.learn(features, "centred")(features)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(6, dtype=torch.float64))


def test_reference_whitens_the_second_moment() -> None:
    features = skewed()
    learned = Whitening.learn(features)
    uncentred = learned(features + learned.mean)  # the mean is subtracted, but was not learned so
    torch.testing.assert_close(
        uncentred.T @ uncentred / len(features), torch.eye(6, dtype=torch.float64)
    )


def test_largest_variance_comes_first() -> None:
    variance = 1 / Whitening.learn(skewed(), "centred").directions.square().sum(dim=0)
    assert variance.tolist() == sorted(variance.tolist(), reverse=True)


@pytest.mark.parametrize("covariance", ["reference", "centred"])
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_rows_at_a_time_do_not_matter(
    covariance: whitening.Covariance, ridge: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = skewed(50)
    learned = Whitening.learn(features, covariance, ridge)
    expected = learned(features)
    monkeypatch.setattr(whitening, "ROWS", 7)
    torch.testing.assert_close(learned(features), expected)
    by_chunks = Whitening.learn(features, covariance, ridge)
    torch.testing.assert_close(by_chunks.directions.abs(), learned.directions.abs())


def test_small_variances_are_raised_to_the_floor() -> None:
    features = skewed(200, 3)
    flat = torch.cat([features, 1e-9 * features[:, :1]], dim=1)
    variance = 1 / Whitening.learn(flat, "centred").directions.square().sum(dim=0)
    assert variance[3].item() == pytest.approx(FLOOR * variance[0].item())


def test_a_ridge_keeps_copies_together_where_images_are_few() -> None:
    features = torch.randn(12, 40, dtype=torch.float64)
    copies = torch.cat([features, features[:1] + 0.05 * torch.randn(1, 40)])
    cosine = torch.nn.functional.cosine_similarity
    apart = Whitening.learn(copies, "centred")(copies)
    together = Whitening.learn(copies, "centred", ridge=0.1)(copies)
    assert cosine(apart[:1], apart[-1:]).item() < 0.1  # each image alone in its direction
    assert cosine(together[:1], together[-1:]).item() > 0.95


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_equal_images_are_whitened_to_zeros(ridge: float | None) -> None:
    features = torch.ones(20, 3)
    white = Whitening.learn(features, "centred", ridge)(features)
    assert white.dtype == torch.float32
    assert torch.equal(white, torch.zeros(20, 3))
