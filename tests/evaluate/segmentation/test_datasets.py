"""Pictures with masks: both layouts, the network's input, and one sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import scene, write_plain, write_voc
from helpers.videos import save_mask
from PIL import Image

from dino.evaluate.segmentation.datasets import open_scenes
from dino.features.patch_classifiers import PatchExtractor, patch_counts
from dino.files import UserError
from dino.models.create import create


def test_voc_has_lists_and_two_kinds_of_masks(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc")
    scenes = open_scenes(root, "val")
    assert [scene.image.name for scene in scenes] == ["3.jpg", "4.jpg"]
    assert sorted(np.unique(scenes[0].read()[1])) == [0, 1, 15, 255]
    instances = open_scenes(root, "train", "instance")
    assert len(instances) == 3
    assert np.array_equal(instances[2].read()[1], scene(2))


def test_plain_folders_need_no_list(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "plain")
    assert len(open_scenes(root, None)) == 6
    (root / "few.txt").write_text("4\n1\n")
    scenes = open_scenes(root, "few")
    assert [scene.mask.stem for scene in scenes] == ["4", "1"]


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_plain(tmp_path / "plain", 2)
    for name in ("images/notes.txt", "images/more.txt", "images/.hidden.txt"):
        (root / name).touch()
    (root / "masks/7.png").write_bytes((root / "masks/0.png").read_bytes())
    assert len(open_scenes(root, None)) == 2
    printed = capsys.readouterr().err
    assert "images: 2 files are left out, being no images: 2 .txt" in printed
    assert "1 of 3 masks are left out, having no image" in printed
    (root / "all.txt").write_text("0\n1\n")
    open_scenes(root, "all")
    assert "masks" not in capsys.readouterr().err


def test_wrong_layouts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither images and masks nor"):
        open_scenes(tmp_path, "val")
    root = write_plain(tmp_path / "plain", 2)
    (root / "masks/1.png").unlink()
    with pytest.raises(UserError, match=r"there is no mask 1 in .*masks"):
        open_scenes(root, None)
    with pytest.raises(UserError, match=r"the list .*test\.txt is missing"):
        open_scenes(root, "test")
    (root / "test.txt").write_text("")
    with pytest.raises(UserError, match=r"test\.txt is empty"):
        open_scenes(root, "test")
    voc = write_voc(tmp_path / "voc")
    (voc / "ImageSets/Segmentation/val.txt").write_text("zebra\n")
    with pytest.raises(UserError, match=r"there is no image zebra in .*JPEGImages"):
        open_scenes(voc, "val")


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "plain", 2)
    save_mask(np.zeros((24, 30), dtype=np.uint8), root / "masks/0.png")
    scenes = open_scenes(root, None)
    with pytest.raises(UserError, match=r"mask .*0\.png is 30 x 24 pixels, but its image .* 32 x"):
        scenes[0].read()
    (root / "images/1.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image.*; repair it"):
        scenes[1].read()
    Image.new("RGB", (3, 3)).save(root / "images/1.jpg")
    with pytest.raises(UserError, match="have the same name"):
        open_scenes(root, None)


def test_pictures_are_squares_or_keep_their_ratio() -> None:
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=8, image_size=16)
    wide = Image.new("RGB", (100, 60), (255, 0, 0))
    assert PatchExtractor(vit, 40).prepare(wide).shape == (1, 3, 40, 40)
    assert PatchExtractor(vit, 45).prepare(wide).shape == (1, 3, 48, 48)  # complete patches
    found = PatchExtractor(vit, 40, True).prepare(wide)
    assert found.shape == (1, 3, 40, 64)  # 66.7 wide
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(found[0, :, 7, 9], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="--size 7 holds no patch of 8 px"):
        PatchExtractor(vit, 7).prepare(wide)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_ratios_above_8_are_reduced_to_it(size: tuple[int, int]) -> None:
    """With 40 pixels on the shorter side, 20,000 x 1 would have 800,000 on the longer."""
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=8, image_size=16)
    found = PatchExtractor(vit, 40, True).prepare(Image.new("RGB", size))
    assert sorted(found.shape[2:]) == [40, 320]


def test_patches_count_their_pixels() -> None:
    random = np.random.default_rng(0)
    ids = random.choice(np.array([0, 3, 4, 255], dtype=np.uint8), (7, 11))
    counts = patch_counts(ids, (3, 4), [3, 0])
    expected = torch.zeros(3, 3, 4, dtype=torch.int64)
    for y in range(7):
        for x in range(11):
            if ids[y, x] != 255:
                kind = {3: 0, 0: 1}.get(int(ids[y, x]), 2)
                expected[kind, y * 3 // 7, x * 4 // 11] += 1
    assert torch.equal(counts, expected)
