"""Groups of near duplicates: those of a full matrix, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dino.features import near_duplicates
from dino.features.near_duplicates import (
    Group,
    bounding_heads,
    copy_to_keep,
    groups,
    similar_pairs,
)


def angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane at these angles, some longer than others."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    lengths = 1 + torch.arange(len(degrees), dtype=torch.float64)[:, None]
    return torch.stack([radians.cos(), radians.sin()], dim=1) * lengths


def members(group: Group) -> list[int]:
    return [index for index, _ in group]


COS_10 = 0.98


def flooded(features: Tensor, threshold: float) -> list[set[int]]:
    """The sets of two or more, by walking from image to image over the full matrix."""
    rows = torch.nn.functional.normalize(features, dim=1)
    close = (rows @ rows.T >= threshold).tolist()
    left, found = set(range(len(features))), []
    while left:
        waiting, reached = [min(left)], set()
        while waiting:
            image = waiting.pop()
            if image not in reached:
                reached.add(image)
                waiting += [other for other in left if close[image][other]]
        left -= reached
        if len(reached) > 1:
            found.append(reached)
    return found


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_pairs(tile: int) -> None:
    features = angles(0, 90, 5, 100, 200)
    pairs = torch.cat(list(similar_pairs(features, COS_10, tile=tile))).tolist()
    assert sorted(pairs) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_a_chain_is_one_group_ordered_from_its_middle(tile: int) -> None:
    first, second = groups(angles(20, 90, 0, 10, 99, 200), COS_10, tile=tile)
    assert first[0] == (3, 1.0)  # 10 degrees, between the others
    assert sorted(members(first)) == [0, 2, 3]
    cosine = torch.tensor(10.0).deg2rad().cos().item()
    assert [similarity for _, similarity in first[1:]] == pytest.approx([cosine] * 2)
    assert sorted(members(second)) == [1, 4]


@given(
    degrees=st.lists(st.integers(0, 359), min_size=1, max_size=14),
    tile=st.integers(1, 15),
    threshold=st.sampled_from([0.9, 0.99, 0.999]),
)
def test_groups_equal_those_of_the_matrix(degrees: list[int], tile: int, threshold: float) -> None:
    features = angles(*degrees)
    found = groups(features, threshold, tile=tile)
    assert sorted(sorted(members(group)) for group in found) == sorted(
        map(sorted, flooded(features, threshold))
    )
    sizes = [len(group) for group in found]
    assert sizes == sorted(sizes, reverse=True)
    for group in found:
        similarities = [similarity for _, similarity in group]
        assert similarities == sorted(similarities, reverse=True)


def test_known_pairs_are_joined_whatever_their_features() -> None:
    (group,) = groups(angles(0, 90, 180), 0.999, known=[(0, 2)])
    assert sorted(members(group)) == [0, 2]
    assert groups(angles(0, 90, 180), 0.999) == []


def test_many_equal_images() -> None:
    (group,) = groups(torch.ones(300, 2), 0.9, tile=64)
    assert members(group) == list(range(300))
    assert all(similarity == pytest.approx(1) for _, similarity in group)


def test_the_copy_to_keep_is_the_largest(tmp_path: Path) -> None:
    small, large = tmp_path / "b", tmp_path / "c"
    small.write_bytes(b"1")
    large.write_bytes(b"22")
    sizes = {"z": (3, 4), str(large): (2, 5), "a": (4, 2)}
    assert copy_to_keep(sizes) == "z"
    sizes = {"y/2": (3, 4), "y/1": (4, 3), "y/3": (1, 1)}
    assert copy_to_keep(sizes) == "y/1"  # as many pixels: by name
    sizes = {str(small): (3, 4), str(large): (3, 4)}
    assert copy_to_keep(sizes) == str(large)  # less compressed


@pytest.mark.parametrize("decay", [0.0, 0.5])  # equal variances, and some far larger than others
def test_pairs_that_the_bound_excludes_are_no_pairs(
    decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    scale = torch.arange(1.0, 129).pow(-decay)
    features = torch.randn(600, 128, generator=generator) * scale
    features[300:330] = features[:30] + 0.3 * scale * torch.randn(30, 128, generator=generator)
    features[7] = 0  # has no direction
    rows = torch.nn.functional.normalize(features, dim=1)
    cosines = (rows @ rows.T).triu(1)
    threshold = float(cosines.flatten().topk(25).values.mean())
    heads = bounding_heads(features, threshold, torch.device("cpu"))
    assert heads is not None
    assert heads.shape[1] < 100
    bounds = (heads @ heads.T)[~torch.eye(600, dtype=torch.bool)]
    assert (bounds >= (rows @ rows.T)[~torch.eye(600, dtype=torch.bool)] - 1e-5).all()
    verified = []
    real = near_duplicates._verified
    monkeypatch.setattr(
        near_duplicates, "_verified", lambda *words: verified.append(len(words[2])) or real(*words)
    )
    found = torch.cat([*similar_pairs(features, threshold, tile=64)])
    expected = (cosines >= threshold).nonzero()
    assert sorted(found.tolist()) == expected.tolist()
    assert len(expected) > 5
    assert len(verified) > 40
    assert sum(verified) < 0.1 * 600**2 / 2
