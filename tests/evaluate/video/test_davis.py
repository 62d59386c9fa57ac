"""The layout of DAVIS: what is found, and one sentence for what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.videos import frame, picture, save_mask, write_davis
from PIL import Image

from dino.evaluate.video.davis import open_davis
from dino.files import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_davis(tmp_path / "davis", {"b": [1], "a": [1, 2]})


def test_sequences_in_the_order_of_the_list(root: Path) -> None:
    clips = open_davis(root)
    assert [clip.name for clip in clips] == ["b", "a"]
    assert [path.name for path in clips[0].frames] == [f"{i:05}.jpg" for i in range(5)]
    assert [path.name for path in clips[0].masks] == [f"{i:05}.png" for i in range(5)]
    assert clips[0].scored


def test_named_sequences_need_no_list(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").unlink()
    assert [clip.name for clip in open_davis(root, sequences=["a"])] == ["a"]
    with pytest.raises(UserError, match=r"JPEGImages/480p/zebra is missing"):
        open_davis(root, sequences=["zebra"])


def test_the_first_mask_alone_is_enough_but_gives_no_score(root: Path) -> None:
    for path in sorted((root / "Annotations/480p/a").iterdir())[1:]:
        path.unlink()
    clip = open_davis(root, sequences=["a"])[0]
    assert len(clip.masks) == 1
    assert not clip.scored


def test_other_files_make_another_fingerprint(root: Path) -> None:
    def fingerprint() -> str:
        return open_davis(root, sequences=["a"])[0].fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    mask = root / "Annotations/480p/a/00003.png"
    save_mask(frame(2, [1, 2]), mask)
    assert fingerprint() != before
    save_mask(frame(3, [1, 2]), mask)
    assert fingerprint() == before
    Image.new("RGB", (40, 32)).save(root / "JPEGImages/480p/a/00003.jpg")
    assert fingerprint() != before


def test_wrong_layouts_are_refused_by_name(root: Path) -> None:
    with pytest.raises(UserError, match=r"JPEGImages/1080p does not exist"):
        open_davis(root, resolution="1080p")
    with pytest.raises(UserError, match=r"ImageSets/2017/test-dev\.txt is missing"):
        open_davis(root, split="test-dev")
    (root / "ImageSets/2017/none.txt").write_text("\n")
    with pytest.raises(UserError, match=r"none\.txt is empty"):
        open_davis(root, split="none")
    (root / "JPEGImages/480p/void").mkdir()
    with pytest.raises(UserError, match=r"480p/void holds no files that end in"):
        open_davis(root, sequences=["void"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["JPEGImages/480p/a/00002.jpg", "Annotations/480p/a/00002.png"])
def test_pipes_are_refused_by_name(name: str, root: Path) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(UserError, match=r"00002\.(jpg|png) cannot be read .*no regular file"):
        open_davis(root, sequences=["a"])


def test_masks_that_do_not_fit_are_refused_by_name(root: Path) -> None:
    masks, images = root / "Annotations/480p/a", root / "JPEGImages/480p/a"
    save_mask(frame(0, [1]), masks / "00099.png")
    with pytest.raises(UserError, match=r"00099\.png belongs to no frame"):
        open_davis(root)
    (masks / "00099.png").rename(masks / "../99.png")
    (masks / "00002.png").unlink()
    with pytest.raises(UserError, match=r"00002\.jpg has no mask .*a/00002\.png"):
        open_davis(root)
    save_mask(np.zeros((32, 41), dtype=np.uint8), masks / "00002.png")
    with pytest.raises(UserError, match=r"00002\.png is 41 x 32 pixels, but the first frame"):
        open_davis(root)
    save_mask(frame(2, [1]), masks / "00002.png")
    picture(frame(2, [1], (34, 40))).save(images / "00002.jpg")
    with pytest.raises(UserError, match=r"00002\.jpg is 40 x 34 pixels"):
        open_davis(root)
    (images / "00002.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"00002\.jpg cannot be read"):
        open_davis(root)
    (masks / "00000.png").unlink()
    with pytest.raises(UserError, match=r"frame .*00000\.jpg has no mask"):
        open_davis(root)
