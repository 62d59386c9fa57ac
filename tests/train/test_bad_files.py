"""A folder with bad files of every kind trains to the end, and the list of them is exact."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import get_args

from helpers import spoiled
from helpers.small import TINY_RUN

import dino
from dino.data.commands.check import check
from dino.data.images.image_errors import Defect
from dino.data.images.pixel_format import RGB

FILES, EACH = 300, 3


def listed(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(line["path"], line["defect"]) for line in csv.DictReader(file)]


def test_every_kind_of_bad_file_is_skipped_and_listed(tmp_path: Path) -> None:
    source, wrong = spoiled.spoil(tmp_path / "images", FILES, EACH)
    assert set(spoiled.KINDS) == set(get_args(Defect))
    assert len(wrong) == EACH * len(spoiled.KINDS)
    settings = {
        **TINY_RUN,
        "run.batch": 30,
        "run.duration": "1 epochs",
        "execution.workers": 2,
        "execution.checkpoint_every": "1 epochs",
    }
    run = tmp_path / "run"
    result = dino.pretrain("demo", data=source, out=run, device="cpu", settings=settings)
    assert result.finished
    assert (result.step, result.skipped) == (FILES // 30, len(wrong))
    assert listed(run / "skipped.csv") == sorted(wrong.items())
    found = check(source, RGB, workers=1).bad
    assert {path: defect for path, (defect, _) in found.items()} == wrong
