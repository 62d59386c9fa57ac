"""The map of a folder as one page: places, thumbnails, and names that cannot break it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino.cli import main
from dino.jobs.map import same_class


def test_the_share_of_neighbours_of_the_same_class() -> None:
    places = np.array([[0, 0], [0, 0.1], [0.1, 0], [1, 1], [1, 0.9], [0.9, 1]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert same_class(places, labels) == pytest.approx(100 * 2 / 5)  # all five others are near


def test_the_page_has_the_images_and_their_places(
    weights: str, color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    photos = color_folder("photos", 3, {"<script>&": (200, 10, 10), "blue": (10, 10, 200)})
    (photos / "blue/damaged.png").write_bytes(b"none")
    out = tmp_path / "out"
    words = ["--workers", "0", "--out", str(out), "--thumbnails", "4", "--baseline"]
    main(["map", weights, str(photos), *words])
    with (out / "map.csv").open() as file:
        places = {line["path"]: line for line in csv.DictReader(file)}
    assert len(places) == 6
    page = (out / "map.html").read_text()
    assert page.count("<script>") == 1  # the name of a class is none
    found = re.search(r"^const images = (.*);$", page, re.MULTILINE)
    assert found
    images = json.loads(found[1])
    assert len(images) == 4
    for one in images:
        line = places[one["name"]]
        assert (one["x"], one["y"]) == pytest.approx((float(line["x"]), float(line["y"])), abs=1e-4)
        assert one["class"] == line["class"] == Path(one["name"]).parent.name
        assert one["picture"].startswith("data:image/jpeg;base64,")
    assert not re.search(r"\{(title|note|light|dark|images|colors)\}", page)
    content = json.loads((out / "map.json").read_text())
    assert content["map"]["same_class"].keys() == {"trained", "untrained", "pixels"}
