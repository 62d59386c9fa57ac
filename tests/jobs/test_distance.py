"""Distances of folders: by matrix roots and all pairs; how often intervals hold the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fakes import COLORS
from scipy.linalg import sqrtm
from torch import Tensor

from dino.cli import main
from dino.files import UserError
from dino.jobs import distance
from dino.jobs.distance import (
    GROUPS,
    Distance,
    Moments,
    divided,
    frechet,
    frechet_distance,
    kernel_distance,
    run,
)


def gaussian(count: int, mean: float, deviation: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, len(deviation), generator=generator, dtype=torch.float64)
    return rows * deviation + mean


@pytest.mark.parametrize("count", [300, 4])  # with 4 images the covariance has no Cholesky factor
def test_the_frechet_distance_is_that_of_the_matrix_root(count: int) -> None:
    first = gaussian(count, 0.0, torch.linspace(0.5, 2, 6), 0)
    second = gaussian(200, 0.3, torch.linspace(2, 1, 6), 1) @ torch.randn(6, 6).double()
    origin = torch.full((6,), 5.0).double()
    ours = frechet(Moments.of([first], origin), Moments.of([second[:90], second[90:]], origin))
    one, two = (np.cov(rows.numpy(), rowvar=False) for rows in (first, second))
    apart = float((first.mean(0) - second.mean(0)).square().sum())
    theirs = apart + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_kernel_distance_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "ROWS", 3)
    first, second = gaussian(43, 0, torch.ones(4), 0), gaussian(51, 0.5, torch.ones(4), 1)

    def mean(one: Tensor, two: Tensor) -> float:
        values = (one.numpy() @ two.numpy().T / 4 + 1) ** 3
        pairs = ~np.eye(len(one), dtype=bool) if one is two else np.ones(values.shape, bool)
        return float(values[pairs].mean())

    everything = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    sides = divided(first, 0), divided(second, 0)
    parts = []
    for left_out in range(GROUPS):
        one, two = (
            torch.cat([group for number, group in enumerate(side) if number != left_out])
            for side in sides
        )
        parts.append(mean(one, one) + mean(two, two) - 2 * mean(one, two))
    expected = GROUPS * everything - (GROUPS - 1) * sum(parts) / GROUPS
    assert kernel_distance(*sides).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shift", [0.5, 0.2])
def test_intervals_hold_the_true_distance(shift: float) -> None:
    deviation, trials = torch.linspace(0.5, 1.5, 5, dtype=torch.float64), 60
    truth = 5 * shift**2 + float((deviation - 1).square().sum())
    held, biases = 0, []
    for seed in range(trials):
        first = gaussian(200, 0.0, deviation, 2 * seed)
        second = gaussian(150, shift, torch.ones(5), 2 * seed + 1)
        found = frechet_distance(divided(first, seed), divided(second, seed))
        held += found.low <= truth <= found.high
        biases.append(found.value - truth)
    assert held >= 0.88 * trials  # 95 % are expected
    assert abs(np.mean(biases)) < 0.15 * np.std(biases) + 2 * np.std(biases) / trials**0.5


def test_equal_distributions_are_not_told_apart() -> None:
    trials, apart = 40, 0
    for seed in range(trials):
        sides = [divided(gaussian(120, 0.0, torch.ones(4), 2 * seed + i), seed) for i in (0, 1)]
        apart += kernel_distance(*sides).low > 0
    assert apart <= 0.1 * trials


def test_the_command_tells_colours_apart(
    weights: str, color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [str(color_folder(name, 40, {name: COLORS[name]})) for name in ("red", "blue")]
    out = tmp_path / "out"
    main(["distance", weights, *folders, "--out", str(out), "--workers", "0"])
    content = json.loads((out / "distance.json").read_text())
    assert content["images"] == [40, 40]
    assert content["distance"]["trained"]["kernel"]["interval"][0] > 0
    few = str(color_folder("few", 13))
    with pytest.raises(UserError, match="few has 39 images: an interval needs at least 40"):
        run(Distance(weights=weights, data=(few, few), out=out))
    networks = Distance(weights=weights, data=(few, few), out=out, baseline=True).networks
    assert networks(torch.device("cpu"))["pixels"].embed_dim == 3 * 16 * 16
