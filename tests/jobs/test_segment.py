"""Masks from a few masks or clicks: coloured squares are found by their colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fakes import PatchColors
from helpers.pictures import scene, write_plain
from PIL import Image

from dino.cli import main
from dino.data.images.masks import read_mask
from dino.data.sources.named_inputs import named_inputs
from dino.features.patch_classifiers import PatchExtractor
from dino.files import UserError
from dino.jobs.segment import Click, Segment, clicked_patches, painted, read_clicks, run


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Eight pictures with coloured squares, and masks of all and of the first three."""
    root = write_plain(tmp_path / "cells", count=8)
    (root / "some").mkdir()
    for seed in range(3):
        (root / f"some/{seed}.png").write_bytes((root / f"masks/{seed}.png").read_bytes())
    return root


def settings(weights: str, root: Path, **changes: Any) -> Segment:
    given = {"weights": weights, "data": str(root / "images"), "out": root / "out", "size": 48}
    return Segment(**{**given, **changes})


@pytest.mark.parametrize("method", ["linear", "neighbours"])
def test_masks_of_all_images_from_three(weights: str, cells: Path, method: str) -> None:
    words = ["--masks", str(cells / "some"), "--val", str(cells / "masks"), "--size", "48"]
    out = cells / "out"
    words += ["--method", method, "--baseline", "--out", str(out)]
    main(["segment", weights, str(cells / "images"), *words])
    content = json.loads((out / "segment.json").read_text())
    assert content["segment"]["pixels"]["miou"] > 90
    assert content["segment"].keys() == {"trained", "untrained", "pixels"}
    assert content["compared"] == 5
    assert len(content["examples"]) == 3
    for seed in range(8):
        found = read_mask(out / f"masks/{seed}.png")
        assert found.ids.shape == scene(seed).shape
        assert {*np.unique(found.ids)} <= {0, 1, 2}
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 400


def test_clicks_take_the_patches_under_them(cells: Path) -> None:
    images = named_inputs([str(cells / "images")], PatchColors().preprocessing.pixels)
    (cells / "clicks.csv").write_text("image,x,y,class\n3.png,31,23,7\n0.png,0,4,0\n3.png,0,0,0\n")
    clicks = read_clicks(cells / "clicks.csv", images)
    assert clicks == {3: [Click(31, 23, 7), Click(0, 0, 0)], 0: [Click(0, 4, 0)]}
    extractor = PatchExtractor(PatchColors(), 24, True)
    bank = clicked_patches(extractor, images, clicks)
    source = images[0].source
    assert source is not None
    third, first = (extractor.features(source[index]) for index in (3, 0))
    expected = [third[:, 5, 7], third[:, 0, 0], first[:, 1, 0]]
    assert bank.features.tolist() == [row.tolist() for row in expected]
    assert bank.classes == [0, 7]
    assert bank.shares.tolist() == [[0, 1], [1, 0], [1, 0]]


def test_masks_from_clicks(weights: str, cells: Path) -> None:
    lines = ["image,x,y,class"]
    for seed in (0, 1):
        ids = scene(seed)
        for label in np.unique(ids):
            y, x = np.argwhere(ids == label)[-1]
            lines.append(f"{seed}.png,{x},{y},{label}")
    (cells / "clicks.csv").write_text("\n".join(lines) + "\n")
    how = {"clicks": cells / "clicks.csv", "val": cells / "masks", "method": "neighbours"}
    found = run(settings(weights, cells, **how, baseline=True))
    assert found["pixels"]["miou"] > 60


def test_mistakes_are_named(weights: str, cells: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            run(settings(weights, cells, **changes))

    refused("either --masks of some images, or --clicks")
    refused("--baseline and --compare need --val", masks=cells / "some", baseline=True)
    refused("no mask of an image that is no example", masks=cells / "masks", val=cells / "some")
    (cells / "some/other.png").write_bytes((cells / "some/0.png").read_bytes())
    refused("1 masks have no image of their name", masks=cells / "some")
    clicks = cells / "clicks.csv"
    for text, words in {
        "image,x,y,class\n9.png,0,0,1\n": "line 2: there is no image 9.png",
        "image,x,y\n0.png,0,0\n": "columns image, x, y, class",
        "image,x,y,class\n0.png,0,zero,1\n": "columns image, x, y, class",
        "image,x,y,class\n0.png,0,0,1\n": "fewer than two classes",
        "image,x,y,class\n0.png,0,0,1\n0.png,0,0,255\n": "line 3: classes go from 0 to 254",
        "image,x,y,class\n0.png,0,0,1\n0.png,32,0,0\n": "32, 0 lies outside of",
    }.items():
        clicks.write_text(text)
        refused(words, clicks=clicks)


def test_a_painted_image_keeps_its_background() -> None:
    picture = Image.new("RGB", (2, 1), (10, 20, 30))
    found = np.asarray(painted(picture, np.array([[0, 2]], dtype=np.uint8)))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[0, 1].tolist() == [56, 116, 152]  # 60 % of (86, 180, 233)
