"""Anomalies: the measures against slow oracles, and squares planted in plain images."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from dino.cli import main
from dino.files import UserError
from dino.jobs.anomalies import (
    Anomalies,
    MemoryBank,
    PixelScores,
    auroc,
    distances,
    image_score,
    run,
)


def test_auroc_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    normal, other = generator.integers(0, 9, 40), generator.integers(3, 12, 25)  # with ties
    truth = [0] * 40 + [1] * 25
    expected = 100 * roc_auc_score(truth, np.concatenate([normal, other]))
    assert auroc(normal.tolist(), other.tolist()) == pytest.approx(expected)


def slow_pro(maps: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """The area under the curve of all thresholds, region by region and pixel by pixel."""
    points = [(0.0, 0.0)]
    everything = np.concatenate([one.ravel() for one in maps])
    normal = np.concatenate([one[~mask] for one, mask in zip(maps, masks, strict=True)])
    for threshold in np.unique(everything)[::-1]:
        overlaps = []
        for one, mask in zip(maps, masks, strict=True):
            regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
            overlaps += [(one[regions == n] >= threshold).mean() for n in range(1, count + 1)]
        points.append((float((normal >= threshold).mean()), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= 0.3:
            break
        end = min(x1, 0.3)
        y = y1 if x1 == end else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y) / 2
    return 100 * area / 0.3


def test_pro_and_pixel_auroc_are_those_of_all_thresholds() -> None:
    generator = np.random.default_rng(1)
    scores, maps, masks = PixelScores(), [], []
    for seed in range(3):
        mask = ndimage.binary_dilation(generator.random((20, 30)) < 0.01 * seed, iterations=2)
        noise = generator.random((20, 30)) * 1.4 + 0.3 * mask
        maps.append(noise)
        masks.append(mask)
        scores.add(noise, mask)
    found = scores.measures()
    pixels = np.concatenate([mask.ravel() for mask in masks])
    values = np.concatenate([one.ravel() for one in maps])
    assert scores.count == sum(ndimage.label(m, np.ones((3, 3)))[1] for m in masks) > 4
    assert found["pixel_auroc"] == pytest.approx(100 * roc_auc_score(pixels, values), abs=0.01)
    assert found["pro"] == pytest.approx(slow_pro(maps, masks), abs=0.01)


def test_distances_and_scores_of_patches() -> None:
    bank = torch.eye(4)[:2]
    patches = torch.tensor([[3.0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [-1, -1, 0, 0]])
    expected = torch.tensor([0, 1, 1 - 0.5**0.5, 1 + 0.5**0.5])
    assert torch.allclose(distances(patches, bank), expected, atol=1e-6)
    assert image_score(torch.arange(100.0).view(10, 10), 0.03) == 98
    assert image_score(torch.arange(9.0).view(3, 3), 0.01) == 8  # at least one patch


def test_the_bank_is_drawn_evenly_and_without_an_image() -> None:
    maps = [
        (i, torch.full((3, 4, 5), float(i + 1)) * torch.eye(3)[i, :, None, None]) for i in (0, 2)
    ]
    bank = MemoryBank.of(maps, 7, 0)
    assert bank.features.shape == (14, 3)
    assert bank.image.tolist() == [0] * 7 + [2] * 7
    assert bank.without(0).unique(dim=0).tolist() == [[0, 0, 1]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noisy grey images; in the sub-folder "hole" each has a red square, with its mask."""
    generator = np.random.default_rng(0)
    for number in range(12):
        kind = ("normal", "test/good", "test/hole")[number % 3]
        pixels = (120 + 10 * generator.standard_normal((40, 48, 3))).clip(0, 255).astype(np.uint8)
        if kind == "test/hole":
            y, x = 8 * generator.integers(1, 3), 8 * generator.integers(1, 4)
            pixels[y : y + 8, x : x + 8] = (230, 10, 10)
            mask = np.zeros((40, 48), dtype=np.uint8)
            mask[y : y + 8, x : x + 8] = 255
            (tmp_path / "masks/hole").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(tmp_path / f"masks/hole/{number}_mask.png")
        (tmp_path / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    return tmp_path


def test_planted_squares_are_found_by_raw_pixels(
    weights: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = photos / "out"
    words = ["--queries", str(photos / "test"), "--masks", str(photos / "masks"), "--size", "40"]
    data = str(photos / "normal")
    main(["anomalies", weights, data, *words, "--out", str(out), "--baseline", "--arrays"])
    content = json.loads((out / "anomalies.json").read_text())
    pixels = content["anomalies"]["pixels"]
    assert pixels["auroc"] == 100
    assert pixels["pixel_auroc"] > 95
    assert pixels["pro"] > 85
    assert content["anomalies"].keys() == {"trained", "untrained", "pixels"}
    assert len(content["normal_scores"]) == content["normal_images"] == 4
    with (out / "scores.csv").open() as file:
        lines = [*csv.DictReader(file)]
    scores = [float(line["score"]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(lines) == 8
    assert np.load(out / "maps/hole/2.npz")["distance"].shape == (5, 6)
    with Image.open(out / "maps/hole/2.png") as heat, Image.open(out / "sheet.png") as sheet:
        assert heat.size == (48, 40)
        assert sheet.width > 400
    assert "score above" in capsys.readouterr().out


def test_without_labels_there_are_scores_only(weights: str, photos: Path) -> None:
    settings = {"weights": weights, "data": str(photos / "normal"), "size": 40}
    settings |= {"queries": str(photos / "test/hole"), "out": photos / "out"}
    assert run(Anomalies(**settings)) == {"trained": {}}
    with pytest.raises(UserError, match="no sub-folder fine: change --normal"):
        run(Anomalies(**settings, normal="fine"))
    with pytest.raises(UserError, match=r"no mask in .* is named as an image"):
        run(Anomalies(**settings, masks=photos / "test/good"))
