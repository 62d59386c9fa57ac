"""Selection: farthest first, dense places, one of each group, and never a near duplicate."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dino.cli import main
from dino.files import UserError
from dino.jobs.select import Select, accuracies, density, run, select, sizes_up_to


def unit(seed: int, count: int, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(0, 3))
def test_diverse_is_the_greedy_k_center(seed: int, count: int, known: int) -> None:
    features, present = unit(seed, 12), unit(seed + 1, known)
    found = select(features, "diverse", count, known=present, apart=1.1)
    chosen: list[int] = []
    if not known:
        chosen.append(int((features @ features.mean(dim=0)).argmax()))
    while len(chosen) < count:
        bank = torch.cat([features[chosen], present])
        worst = (features @ bank.T).amax(dim=1)
        worst[chosen] = torch.inf
        chosen.append(int(worst.argmin()))
    assert found.chosen == chosen
    for row, value in zip(chosen[1:], found.similarity[1:], strict=True):
        earlier = chosen[: chosen.index(row)]
        bank = torch.cat([features[earlier], present])
        assert value == pytest.approx(float((bank @ features[row]).max()), abs=1e-5)


def test_typical_images_are_dense_and_outliers_are_not() -> None:
    crowd = F.normalize(torch.tensor([1.0, 0, 0]) + 0.2 * unit(0, 30, 3), dim=1)
    features = torch.cat([crowd, torch.tensor([[-1.0, 0, 0], [0, -1, 0]])])
    similarity = features @ features.T
    similarity.fill_diagonal_(-torch.inf)
    expected = similarity.topk(20, dim=1).values.mean(dim=1)
    assert torch.allclose(density(features), expected, atol=1e-6)
    assert {*select(features, "outliers", 2).chosen} == {30, 31}
    assert select(features, "typical", 1, apart=1.1).chosen == [int(expected.argmax())]


@pytest.mark.parametrize("method", ["diverse", "balanced"])
def test_one_of_each_planted_group(method: Any) -> None:
    truth = torch.arange(60) % 6
    features = F.normalize(torch.eye(8)[truth] + 0.05 * unit(3, 60, 8), dim=1)
    found = select(features, method, 6, apart=1.1)
    assert sorted(truth[found.chosen].tolist()) == [*range(6)]


@pytest.mark.parametrize("method", ["diverse", "typical", "outliers", "balanced"])
def test_near_duplicates_are_left_out(method: Any) -> None:
    once = unit(5, 9, 16)
    features = once.repeat(3, 1)
    found = select(features, method, 20, known=once[:2], apart=0.999)
    assert sorted(row % 9 for row in found.chosen) == [*range(2, 9)]
    assert max(found.similarity[1:]) < 0.999


def test_the_accuracy_of_the_nearest_label() -> None:
    features, labels = unit(7, 40), torch.arange(40) % 3
    chosen = [4, 9, 2, 30]
    others = [row for row in range(40) if row not in chosen[:3]]
    right = [
        labels[chosen[int((features[chosen[:3]] @ features[row]).argmax())]] == labels[row]
        for row in others
    ]
    found = accuracies(features, labels, chosen, [3])
    assert found == pytest.approx([100 * float(np.mean(right))])
    assert sizes_up_to(100) == [3, 6, 12, 25, 50, 100]
    assert sizes_up_to(2) == [1, 2]


def test_the_command_compares_with_random_selections(
    weights: str,
    color_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, out = color_folder("photos", 6), tmp_path / "out"
    words = [
        "--method",
        "diverse",
        "--count",
        "3",
        "--workers",
        "0",
        "--out",
        str(out),
        "--baseline",
        "--apart",
        "1",
    ]
    main(["select", weights, str(photos), *words])
    content = json.loads((out / "select.json").read_text())["select"]
    assert content["accuracy"].keys() == {"trained", "untrained", "pixels", "random"}
    assert content["labels"] == [1, 3]
    with (out / "selected.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert [line["rank"] for line in lines] == ["1", "2", "3"]
    assert lines[0]["similarity_to_earlier"] == ""
    assert "3 of 18 images selected" in capsys.readouterr().out
    assert (out / "sheet.png").exists()


def test_mistakes_are_named(
    weights: str, color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"weights": weights, "out": tmp_path / "out", "workers": 0}
    photos = color_folder("photos", 1)
    with pytest.raises(UserError, match="3 images leave no choice of 3"):
        run(Select(**settings, data=str(photos), count=3))
    with pytest.raises(UserError, match="need images with classes"):
        run(Select(**settings, data=str(color_folder("more", 3) / "red"), count=1, baseline=True))
