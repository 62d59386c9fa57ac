"""Subsets: by class, by seed, one within the other, and as lists say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.label_subsets import fraction, listed, shots, subsets
from dino.files import UserError

LABELS = torch.tensor([0] * 100 + [1] * 30 + [2] * 3)[torch.randperm(133)]


def counts(indices: list[int]) -> list[int]:
    assert indices == sorted(set(indices))
    return torch.bincount(LABELS[indices], minlength=3).tolist()


def test_a_fraction_is_taken_of_each_class() -> None:
    assert counts(fraction(LABELS, 0.1, 0)) == [10, 3, 1]
    assert counts(fraction(LABELS, 0.01, 0)) == [1, 1, 1]
    assert fraction(LABELS, 1, 5) == list(range(133))


def test_shots_are_so_many_of_each_class() -> None:
    assert counts(shots(LABELS, 3, 0)) == [3, 3, 3]
    with pytest.raises(UserError, match="only 3 images: choose less than 4"):
        shots(LABELS, 4, 0)
    for count in (0, -1):
        with pytest.raises(UserError, match="at least 1"):
            shots(LABELS, count, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_impossible_fractions_are_refused(share: float) -> None:
    with pytest.raises(UserError, match="fraction"):
        fraction(LABELS, share, 0)


def test_seeds_differ_and_larger_subsets_contain_smaller_ones() -> None:
    assert fraction(LABELS, 0.1, 0) == fraction(LABELS, 0.1, 0) != fraction(LABELS, 0.1, 1)
    assert {*fraction(LABELS, 0.1, 0)} < {*fraction(LABELS, 0.5, 0)}
    assert {*shots(LABELS, 1, 0)} < {*shots(LABELS, 3, 0)}


def test_each_class_is_drawn_independently() -> None:
    chosen = fraction(torch.arange(400) % 2, 0.1, 0)
    places = [{index // 2 for index in chosen if index % 2 == label} for label in (0, 1)]
    assert places[0] != places[1]


def test_other_classes_do_not_change_the_drawn_images() -> None:
    without = LABELS[LABELS != 1]
    places = (LABELS != 1).nonzero().squeeze(1)
    chosen = {int(places[index]) for index in fraction(without, 0.1, 0)}
    assert chosen == {index for index in fraction(LABELS, 0.1, 0) if LABELS[index] != 1}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/3.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "data" / name)
    return open_source(tmp_path / "data")


def test_a_list_names_images(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("b/1.png\n\n2.png\r\ndata/b/3.png\n")
    assert listed(source, path) == [1, 2, 3]
    for line, found in (("1.png", "2"), ("c/1.png", "none"), ("4.png", "none")):
        path.write_text(f"2.png\n{line}\n")
        with pytest.raises(UserError, match=f"{line} in .*list.txt names {found} of the images"):
            listed(source, path)
    path.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        listed(source, path)
    with pytest.raises(UserError, match="cannot be read"):
        listed(source, tmp_path / "nowhere.txt")


def test_subsets_are_drawn_once_for_each_seed(source: Source, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a/1.png\n")
    labels = torch.tensor(source.labels)
    drawn = subsets(
        source,
        labels,
        fractions=(0.5, 1.0),
        shot_counts=(1, 2),
        lists=(tmp_path / "one.txt",),
        seeds=2,
    )
    assert [(subset.name, subset.seed) for subset in drawn] == [
        ("50 %", 0),
        ("50 %", 1),
        ("100 %", None),
        ("1 shot", 0),
        ("1 shot", 1),
        ("2 shots", 0),
        ("2 shots", 1),
        ("one.txt", None),
    ]
    assert drawn[2].indices == [0, 1, 2, 3]
    assert drawn[-1].indices == [0]
