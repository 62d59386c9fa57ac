"""Duplicates: altered copies are found, by the command and by its alias."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from dino.cli import main
from dino.data.sources.demo import photographs
from dino.files import UserError
from dino.jobs.duplicates import FindDuplicates, run


def test_copies_are_found_and_the_largest_is_kept(weights: str, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number, picture in enumerate(photographs().values()):
        ImageOps.fit(picture, (96, 80)).save(photos / f"{number:02}.png")
    with Image.open(photos / "03.png") as picture:
        picture.convert("RGB").resize((60, 50)).save(photos / "copy.jpg", quality=90)
    words = ["--workers", "0", "--size", "32", "--threshold", "0.8"]
    main(["duplicates", weights, str(photos), "--out", str(out), *words])
    (group,) = json.loads((out / "duplicates.json").read_text())["duplicates"]["groups"]
    assert {Path(path).name for path in group} == {"03.png", "copy.jpg"}
    with (out / "groups.csv").open() as file:
        keep = {Path(line["path"]).name: line["keep"] for line in csv.DictReader(file)}
    assert keep == {"03.png": "yes", "copy.jpg": "no"}
    assert (out / "sheet.png").exists()
    main(["evaluate", "copies", weights, str(photos), "--out", str(out / "alias.json"), *words])
    assert json.loads((out / "alias.json").read_text())["duplicates"]["groups"] == [group]
    with pytest.raises(UserError, match="no measure for --baseline"):
        run(FindDuplicates(weights=weights, data=str(photos), out=out, baseline=True))
