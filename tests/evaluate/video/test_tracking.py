"""Objects tracked through small videos, and the steps from frames to labels to masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fakes import PatchColors
from helpers.videos import PALETTE, frame, picture, save_mask, write_davis

from dino.data.images.pixel_format import IMAGENET_STD
from dino.data.images.preprocessing import Preprocessing
from dino.evaluate.video.davis import open_davis
from dino.evaluate.video.davis_metrics import jaccard
from dino.evaluate.video.propagation import stretched
from dino.evaluate.video.tracking import (
    REFERENCE_STD,
    Tracking,
    mask_of,
    one_hot,
    read_frame,
    statistics_of,
    track,
    working_size,
)
from dino.files import UserError
from dino.models.create import create

SMALL = Tracking(size=32, radius=2)


def test_two_objects_are_tracked_with_their_numbers_and_colors(tmp_path: Path) -> None:
    clip = open_davis(write_davis(tmp_path, {"two": [1, 2]}))[0]
    found = list(track(PatchColors().eval(), clip, SMALL))
    assert len(found) == 5
    for time, mask in enumerate(found):
        assert list(mask.palette or ()) == PALETTE[:768]
        assert mask.ids.shape == (32, 40)
        for number in (1, 2):
            assert jaccard(mask.ids == number, frame(time, [1, 2]) == number) > 0.6


def test_an_object_may_leave_and_the_others_stay(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"leaving": [1, 2]})
    for time in range(2, 5):
        picture(frame(time, [1])).save(
            root / f"JPEGImages/480p/leaving/{time:05}.jpg", quality=95, subsampling=0
        )
    found = list(track(PatchColors().eval(), open_davis(root)[0], SMALL))
    assert jaccard(found[4].ids == 1, frame(4, [1]) == 1) > 0.6


def test_an_object_that_no_patch_shows_is_found_nowhere(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"tiny": [1]})
    expected = list(track(PatchColors().eval(), open_davis(root)[0], SMALL))
    ids = frame(0, [1])
    ids[0, 0] = 9
    save_mask(ids, root / "Annotations/480p/tiny/00000.png")
    found = list(track(PatchColors().eval(), open_davis(root)[0], SMALL))
    assert found[0].objects == [1, 9]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert np.array_equal(ours.ids, theirs.ids)


def test_any_patch_size_and_convnets_work(tmp_path: Path) -> None:
    clip = open_davis(write_davis(tmp_path, {"one": [1]}, frames=3))[0]
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=7, image_size=14)
    for network in (vit, create("resnet50")):
        found = list(track(network.eval(), clip, Tracking(size=64)))
        assert [mask.ids.shape for mask in found] == 3 * [(32, 40)]


@pytest.mark.parametrize(
    ("size", "short", "patch", "expected"),
    [
        ((480, 854), 480, 16, (480, 832)),  # the published sizes
        ((480, 854), 480, 8, (480, 832)),
        ((854, 480), 480, 16, (832, 480)),
        ((1080, 1920), 480, 16, (480, 832)),
        ((480, 910), 480, 16, (480, 896)),
        ((480, 1152), 480, 8, (480, 1152)),
        ((480, 854), 480, 14, (476, 826)),
        ((500, 500), 480, 16, (480, 480)),
        ((100, 120), 32, 8, (32, 32)),
        ((1, 20_000), 480, 16, (480, 3840)),
    ],
)
def test_working_size(size: Any, short: int, patch: int, expected: tuple[int, int]) -> None:
    assert working_size(*size, short, patch) == expected


def test_sizes_without_a_patch_are_refused() -> None:
    with pytest.raises(UserError, match="--size 10 holds no patch of 16 px"):
        working_size(480, 854, 10, 16)


def test_frames_are_read_in_integer_levels(tmp_path: Path) -> None:
    picture(frame(0, [1], (60, 100))).save(tmp_path / "a.png")
    pixels = read_frame(tmp_path / "a.png", 48, 8)
    assert pixels.shape == (3, 48, 64)
    assert torch.equal(pixels, pixels.round())
    assert (pixels.min(), pixels.max()) == (30, 200)


def test_whose_normalization() -> None:
    backbone = PatchColors()
    assert backbone.preprocessing.std == IMAGENET_STD
    assert statistics_of(backbone, "reference")[1] == REFERENCE_STD
    assert statistics_of(backbone, "weights")[1] == IMAGENET_STD
    backbone.preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    for choice in ("reference", "weights"):
        assert statistics_of(backbone, choice) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))  # type: ignore[arg-type]


def test_labels_of_patches_are_those_of_their_middle() -> None:
    ids = np.zeros((4, 8), dtype=np.uint8)
    ids[:2, 4:], ids[2:, :2] = 5, 255
    labels = one_hot(ids, np.array([0, 5, 9], dtype=np.uint8), (2, 4))
    assert labels.shape == (3, 2, 4)
    assert labels[0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]  # void is background
    assert labels[1].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert not labels[2].any()


def test_labels_are_stretched_before_they_are_compared() -> None:
    labels = torch.tensor([[[1.0, 0.9, 0.8, 0.7]], [[0.0, 0.1, 0.2, 0.3]], [[0.0, 0, 0, 0]]])
    wide = stretched(labels)
    torch.testing.assert_close(wide[0, 0], torch.tensor([1, 2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(wide[1, 0], torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert not wide[2].any()
    constant = torch.full((1, 2, 2), 0.4)
    assert torch.equal(stretched(constant), constant)
    numbers = np.array([0, 6, 7], dtype=np.uint8)
    found = mask_of(labels, (1, 4), numbers, (2, 8))
    assert found.tolist() == 2 * [[0, 0, 0, 0, 6, 6, 6, 6]]
