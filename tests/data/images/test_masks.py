"""Masks in files: numbers, void, palettes, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data.images.masks import VOID, Mask, read_mask, write_mask
from dino.files import UserError

IDS = np.array([[0, 1, 2], [255, 2, 7]], dtype=np.uint8)


def grey(path: Path, *values: int) -> Path:
    Image.fromarray(np.array([values], dtype=np.uint8)).save(path)
    return path


def test_indexed_masks_keep_numbers_and_palette(tmp_path: Path) -> None:
    palette = tuple(range(256)) * 3
    write_mask(Mask(IDS, palette), tmp_path / "a.png")
    found = read_mask(tmp_path / "a.png")
    assert np.array_equal(found.ids, IDS)
    assert found.palette == palette
    assert found.objects == [1, 2, 7]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"


def test_black_and_white_is_one_object(tmp_path: Path) -> None:
    found = read_mask(grey(tmp_path / "a.png", 0, 255, 255))
    assert found.ids.tolist() == [[0, 1, 1]]
    write_mask(replace(found, ids=np.array([[1, 1, 0]], dtype=np.uint8)), tmp_path / "b.png")
    assert np.asarray(Image.open(tmp_path / "b.png")).tolist() == [[255, 255, 0]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "c.png")
    assert read_mask(tmp_path / "c.png").ids.tolist() == [[1, 0]]


def test_grey_numbers_with_void(tmp_path: Path) -> None:
    found = read_mask(grey(tmp_path / "a.png", 0, 1, 2, 255))
    assert found.ids.tolist() == [[0, 1, 2, VOID]]
    assert found.objects == [1, 2]
    assert read_mask(grey(tmp_path / "b.png", 0, 128, 3)).objects == [3, 128]


def test_the_first_mask_decides_what_255_means(tmp_path: Path) -> None:
    later = grey(tmp_path / "later.png", 0, 2, 255)
    with pytest.raises(UserError, match=r"later\.png holds 255 and the objects 2"):
        read_mask(later)
    first = read_mask(grey(tmp_path / "first.png", 0, 1, 2))
    assert read_mask(later, first).ids.tolist() == [[0, 2, VOID]]
    white = read_mask(grey(tmp_path / "white.png", 0, 255))
    assert read_mask(grey(tmp_path / "b.png", 255, 0), white).ids.tolist() == [[1, 0]]


def test_files_that_are_no_masks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(UserError, match=r"torn\.png cannot be read"):
        read_mask(tmp_path / "torn.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "color.png")
    with pytest.raises(UserError, match=r"color\.png is an image of mode RGB"):
        read_mask(tmp_path / "color.png")
    soft = grey(tmp_path / "soft.png", 0, 13, 90, 160, 200, 255)
    with pytest.raises(UserError, match=r"objects 13, 90, 160, 200:"):
        read_mask(soft)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is no regular file"):
        read_mask(tmp_path / "pipe.png")
