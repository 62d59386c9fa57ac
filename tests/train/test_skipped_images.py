"""Images that cannot be used: a run goes on without them, lists them exactly, and has a limit."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ranks as processes
from helpers.small import TINY_RUN
from PIL import Image

from dino.data.images.image_errors import ImageError, read_list, write_list
from dino.data.sources.open import Folder
from dino.files import UserError
from dino.runtime import Ranks
from dino.train import loop
from dino.train.loop import Result, train
from dino.train.recipes import demo
from dino.train.run_log import read_metrics
from dino.train.skipped_images import SkippedImages

CPU = torch.device("cpu")
COUNT, BATCH = 100, 10


def listed(run: Path) -> list[tuple[str, str]]:
    with (run / "skipped.csv").open(newline="", encoding="utf-8") as file:
        return [(line["path"], line["defect"]) for line in csv.DictReader(file)]


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Folder, dict[str, str]]:
    """A hundred files, one of them bad in each way; and what is wrong with which."""
    root = tmp_path / "images"
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 24, 24, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(root / f"{index:03}.jpg")
    content = (root / "000.jpg").read_bytes()
    (root / "011.jpg").write_bytes(b"")
    (root / "033.jpg").write_bytes(b"<html>not found</html>")
    (root / "055.jpg").write_bytes(content[: len(content) // 2])
    Image.new("1", (200, 200)).save(root / "077.png")
    (root / "077.jpg").unlink()
    source = Folder(root)
    (root / "099.jpg").unlink()  # after the scan
    wrong = {
        "011.jpg": "empty",
        "033.jpg": "not an image",
        "055.jpg": "damaged",
        "077.png": "too large",
        "099.jpg": "missing",
    }
    return root, source, {str(root / name): defect for name, defect in wrong.items()}


def trained(source: Folder, run: Path, **changes: object) -> Result:
    settings = {**TINY_RUN, "run.batch": BATCH, "run.duration": "2 epochs", **changes}
    return train(demo().changed(settings), source, run, device=CPU)


@pytest.fixture
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)


@pytest.mark.usefixtures("small_bombs")
def test_a_run_goes_on_without_them_and_lists_them(
    folder: tuple[Path, Folder, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source, wrong = folder
    result = trained(source, tmp_path / "run")
    assert result.finished
    assert result.skipped == len(wrong)
    assert listed(tmp_path / "run") == sorted(wrong.items())
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == len(wrong)
    printed = " ".join(capsys.readouterr().err.split())
    assert "5 images could not be used (1 damaged, 1 empty, 1 missing, 1 not an image" in printed
    assert "skipped.csv" in printed


@pytest.mark.usefixtures("small_bombs")
def test_a_resumed_run_continues_its_list(
    folder: tuple[Path, Folder, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, wrong = folder
    run = tmp_path / "run"
    save = loop._Loop._save

    def save_and_stop(self: loop._Loop, step: int) -> None:
        save(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(loop._Loop, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            trained(source, run, **{"execution.checkpoint_every": "9 steps"})
    before = listed(run)
    result = trained(source, run)
    assert 0 < len(before) <= len(wrong)
    assert result.skipped == len(wrong)
    assert listed(run) == sorted(wrong.items())


@pytest.mark.usefixtures("small_bombs")
def test_more_than_the_limit_of_one_kind_stops_the_run(
    folder: tuple[Path, Folder, dict[str, str]], tmp_path: Path
) -> None:
    root, source, wrong = folder
    (root / "012.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 100 images are empty, more than 1\.00%") as caught:
        trained(source, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "011.jpg" in str(caught.value)
    assert (str(root / "012.jpg"), "empty") in listed(tmp_path / "run")
    result = trained(source, tmp_path / "run", **{"execution.max_skipped": 0.02})
    assert result.skipped == len(wrong) + 1


def test_names_that_are_not_text_are_stored(tmp_path: Path) -> None:
    name = b"caf\xe9,\n1.jpg".decode("utf-8", "surrogateescape")
    for _ in range(2):
        skipped = SkippedImages(tmp_path, 10, 1.0)
        skipped.add([ImageError(name, "it is empty", "empty")])
        skipped.share_and_check(Ranks())
        assert len(skipped) == 1


def _of_rank(here: Ranks, run: Path) -> tuple[int, str, bool]:
    skipped = SkippedImages(run, 100, 0.02)
    skipped.add([ImageError(f"{here.rank}.jpg", "it is empty", "empty")])
    skipped.add([ImageError("both.jpg", "cut", "damaged")])
    skipped.share_and_check(here)
    new = len(skipped)
    skipped.add([ImageError(f"more {here.rank}.jpg", "it is empty", "empty")])
    try:
        skipped.share_and_check(here)
    except UserError as error:
        return new, skipped.describe(), "4 of 100 images are empty" in str(error)
    return new, skipped.describe(), False


def test_all_ranks_know_and_stop_together(tmp_path: Path) -> None:
    answers = processes.run(_of_rank, 2, tmp_path)
    assert answers == [(3, "4 empty, 1 damaged", True)] * 2
    assert len(listed(tmp_path)) == 5


def test_a_list_gives_back_names_that_begin_like_formulas(tmp_path: Path) -> None:
    found = {"=1.png": ("damaged", "+ why"), "-a/@b.png": ("empty", "no bytes")}
    write_list(tmp_path / "list.csv", found)
    assert "\n'=1.png,damaged,'+ why\n" in (tmp_path / "list.csv").read_text()
    assert read_list(tmp_path / "list.csv") == found
