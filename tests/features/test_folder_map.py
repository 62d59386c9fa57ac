"""The map of a folder: bounded, the same each time, with similar images near one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino.data.sources.packed_strings import PackedStrings
from dino.features import folder_map as maps
from dino.features.folder_map import folder_map, placed
from dino.features.index import Index


def groups(count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features of length 1 around three directions, and which."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (count,), generator=generator)
    features = torch.eye(3, 16)[group] + 0.1 * torch.randn(count, 16, generator=generator)
    return F.normalize(features, dim=1), group.numpy()


@pytest.mark.parametrize("landmarks", [60, 2000])
def test_similar_images_are_near(landmarks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "LANDMARKS", landmarks)
    monkeypatch.setattr(maps, "CHUNK", 37)
    features, group = groups(150)
    places = placed(features)
    assert places.shape == (150, 2)
    assert places.min() >= 0
    assert places.max() <= 1
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argsort(axis=1)[:, :3]
    assert (group[nearest] == group[:, None]).mean() > 0.95
    assert np.array_equal(places, placed(features))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_few_images_have_places_of_their_own(count: int) -> None:
    places = placed(groups(count)[0])
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == count
    assert np.isfinite(placed(torch.ones(count, 1))).all()


def test_a_map_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = groups(20)
    files = np.zeros((20, 2), np.int64)
    index = Index(tmp_path, features, PackedStrings("a" * 20), files, [], {"id": "a"})
    first = folder_map(index)
    monkeypatch.setattr(maps, "placed", lambda features: pytest.fail("it is made again"))
    assert np.array_equal(folder_map(index), first)
    with pytest.raises(pytest.fail.Exception):
        folder_map(replace(index, about={"id": "b"}))
