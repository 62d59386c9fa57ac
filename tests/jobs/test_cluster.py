"""Clusters: planted groups are found, and stable; what is not there is unstable."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.cli import main
from dino.files import UserError
from dino.jobs import cluster as module
from dino.jobs.cluster import Cluster, agreement, cluster, run, stability, typicality

SIZES = (40, 25, 15)


def planted(seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around orthogonal directions, in mixed order, and their groups."""
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    rows = np.eye(8)[truth] + noise * generator.standard_normal((len(truth), 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), truth


@pytest.mark.parametrize("method", ["kmeans", "agglomerative", "hdbscan"])
def test_planted_groups_are_found(method: module.Method) -> None:
    features, truth = planted()
    labels = cluster(features, method, 3, 5, 0)
    assert np.array_equal(labels[labels >= 0], truth[labels >= 0])  # the largest is cluster 0
    assert (labels >= 0).mean() > 0.9
    assert agreement(truth, truth) == pytest.approx({"nmi": 1.0, "ari": 1.0})


def test_stability_tells_planted_groups_from_invented_ones() -> None:
    features, truth = planted()
    split = np.where((truth == 0) & (np.arange(len(truth)) % 2 == 0), 3, truth)  # no real group
    found = stability(split, lambda rows: cluster(features[rows], "kmeans", 3, 5, 0), 4, 0)
    assert found[1:3] == pytest.approx(1.0)
    assert found[[0, 3]].max() < 0.7


def test_stability_is_the_mean_of_the_best_jaccard_indices() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, -1])

    def again(rows: np.ndarray) -> np.ndarray:
        return (rows % 2).astype(np.int64)

    expected, generator = np.zeros(2), np.random.default_rng(7)
    for _ in range(3):
        part = {*generator.choice(10, 8, replace=False).tolist()}
        others = [{i for i in part if i % 2 == side} for side in (0, 1)]
        for number in (0, 1):
            one = {i for i in part if labels[i] == number}
            expected[number] += max(len(one & two) / len(one | two) for two in others) / 3
    assert stability(labels, again, 3, 7) == pytest.approx(expected)


def test_typical_images_are_near_the_mean_of_their_cluster() -> None:
    features, truth = planted()
    found = typicality(features, truth)
    for number in range(3):
        rows = features[truth == number].astype(np.float64)
        mean = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
        assert found[truth == number] == pytest.approx(rows @ mean, abs=1e-6)


def test_the_command_writes_lists_sheets_and_a_table(
    weights: str,
    color_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, out = color_folder("photos", 6), tmp_path / "out"
    words = ["--clusters", "3", "--repeats", "1", "--workers", "0", "--baseline"]
    (photos / "blue/damaged.png").write_bytes(b"none")
    words += ["--index", str(tmp_path / "index")]
    main(["cluster", weights, str(photos), "--out", str(out), *words])
    content = json.loads((out / "cluster.json").read_text())
    assert content["clusters"]["pixels"]["nmi"] == pytest.approx(1.0)  # three colours
    assert content["clusters"].keys() == {"trained", "untrained", "pixels"}
    with (out / "clusters.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert len(lines) == 18  # without the damaged one
    assert all(Path(line["path"]).parent.name == line["class"] for line in lines)
    assert (tmp_path / "index/index.json").exists()
    assert {line["class"] for line in lines} == {"blue", "green", "red"}
    for number in "123":
        similar = [float(line["similarity"]) for line in lines if line["cluster"] == number]
        assert similar == sorted(similar, reverse=True) != []
        with Image.open(out / f"cluster-{number}.png") as sheet:
            assert sheet.width > 100
    assert "NMI with classes" in capsys.readouterr().out
    assert str(out / "sheet.png") in [str(path) for path in out.iterdir()]


def test_mistakes_are_named_before_the_work(
    weights: str, color_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = str(color_folder("photos", 2))
    settings = {"weights": weights, "data": photos, "out": tmp_path / "out"}
    with pytest.raises(UserError, match="6 images are too few for --clusters 6"):
        run(Cluster(**settings, clusters=6))
    monkeypatch.setitem(module.MOST, "agglomerative", 5)
    with pytest.raises(UserError, match="at most 5 images, not 6: use kmeans"):
        run(Cluster(**settings, method="agglomerative", clusters=2))
    with pytest.raises(UserError, match="lies in the folder of images"):
        run(Cluster(**{**settings, "out": Path(photos) / "out"}))
