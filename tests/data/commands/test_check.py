"""`dino data check`: what is wrong with which image, and what the others are like."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import spoiled
from helpers.dicoms import dicom
from PIL import Image

from dino import cli
from dino.data.commands.check import Stored, check
from dino.data.commands.stats import measure
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.open import Source, open_source
from dino.files import UserError

pytestmark = pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING for a string


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(line["path"], line["defect"]) for line in csv.DictReader(file)]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_found_as_training_finds_them(tmp_path: Path, workers: int) -> None:
    source, wrong = spoiled.spoil(tmp_path / "a", 40, 2)
    checked = check(source, RGB, workers=workers)
    assert {path: defect for path, (defect, _) in checked.bad.items()} == wrong
    assert checked.images == 40
    assert checked.defects == dict.fromkeys(sorted(spoiled.KINDS), 2)
    assert checked.sizes == [(spoiled.SIDE, spoiled.SIDE)] * 26
    assert checked.stored == {Stored(3, 8, False): 26}
    assert checked.repeated == 26 - 16  # the folder is made of sixteen images


def test_what_images_are_stored_as(tmp_path: Path) -> None:
    Image.new("1", (9, 4)).save(tmp_path / "a.png")
    Image.new("L", (9, 5)).save(tmp_path / "b.jpg")
    Image.new("P", (9, 6)).save(tmp_path / "c.gif")
    Image.new("RGBA", (9, 7)).save(tmp_path / "d.png")
    Image.new("F", (9, 8)).save(tmp_path / "e.tif")
    word = np.arange(81, dtype=np.uint16).reshape(9, 9)
    Image.fromarray(word).save(tmp_path / "f.png")
    np.save(tmp_path / "g.npy", np.ones((10, 9, 3), np.int16))
    dicom(tmp_path / "h.dcm", word[:, :8])
    checked = check(open_source(tmp_path), RGB)
    assert checked.bad == {}
    assert checked.stored == {
        Stored(1, 32, True): 1,
        Stored(1, 1, False): 1,
        Stored(1, 8, False): 1,
        Stored(3, 8, False): 1,
        Stored(4, 8, False): 1,
        Stored(1, 16, False): 2,  # DICOMs too: bits of the file
        Stored(3, 16, False): 1,
    }
    assert len(checked.sizes) == 8
    assert str(Stored(1, 1, False)) == "1 channel of 1 bit"
    assert str(Stored(4, 32, True)) == "4 channels of 32 bits (floats)"


def test_other_channels_are_expected(tmp_path: Path) -> None:
    bands = np.arange(5 * 8 * 9, dtype=np.uint16).reshape(5, 8, 9)
    np.save(tmp_path / "a.npy", bands)
    tifffile.imwrite(tmp_path / "b.tif", bands, photometric="minisblack", metadata={"axes": "CYX"})
    Image.new("RGB", (9, 8)).save(tmp_path / "c.png")
    five = PixelFormat(5)
    checked = check(open_source(tmp_path, five), five)
    assert {Path(path).name: what[0] for path, what in checked.bad.items()} == {"c.png": "misfit"}
    assert checked.stored == {Stored(5, 16, False): 2}
    assert checked.repeated == 1  # the same pixels, whatever file they lie in


def test_sources_in_memory() -> None:
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    checked = check(open_source([image, Image.new("L", (9, 8)), (image + 1, 7)]), RGB)
    assert checked.stored == {Stored(3, 8, False): 2, Stored(1, 8, False): 1}
    assert checked.repeated == 1
    demo = check(open_source("demo:test"), RGB)
    assert demo.stored == {Stored(3, 8, False): len(demo.sizes)}
    wrong = check(open_source("demo:test"), PixelFormat(5))
    assert {defect for defect, _ in wrong.bad.values()} == {"misfit"}


# ---------------------------------------------------------------------------------- command
def test_files_that_are_left_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "a" / "a.png")
    for name in ("b.xyz", "c.xyz", "d"):
        (tmp_path / "a" / name).write_bytes(b"other")
    out = tmp_path / "list.csv"
    cli.main(["data", "check", str(tmp_path / "a"), "--out", str(out), "--workers", "0"])
    assert json.loads((tmp_path / "list.json").read_text())["left_out"] == {".xyz": 2, "": 1}
    printed = capsys.readouterr().out
    assert "left out, no image: .xyz" in printed
    assert "left out, no image: no ending" in printed


def test_a_good_folder_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (300, 200)).save(tmp_path / "a" / "a.png")
    Image.new("RGB", (240, 250)).save(tmp_path / "a" / "b.png")
    out = tmp_path / "list.csv"
    out.write_text("old")
    cli.main(["data", "check", str(tmp_path / "a"), "--out", str(out), "--workers", "0"])
    printed = capsys.readouterr().out
    assert "usable" in printed
    assert str(out) in printed.replace("\n", "")
    assert rows(out) == []
    summary = json.loads((tmp_path / "list.json").read_text())
    assert (summary["images"], summary["usable"], summary["below_224"]) == (2, 2, 1)
    assert summary["short_side"] == [200, 240, 240]
    assert summary["long_side"] == [250, 300, 300]


def test_a_bad_file_ends_in_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a"
    _, wrong = spoiled.spoil(root, 30, 1)
    for path, kind in list(wrong.items()):
        if kind in spoiled.LATER:  # they are not there when the command looks
            wrong.pop(path)
            shutil.rmtree(path, ignore_errors=True)
    out = tmp_path / "list.csv"
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "check", str(root), "--out", str(out), "--workers", "1"])
    assert caught.value.code == 1
    assert rows(out) == sorted(wrong.items())
    printed = capsys.readouterr().out
    for kind in wrong.values():
        assert kind in printed


def test_mistakes_end_in_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    stats = tmp_path / "s.json"
    for words, expected in (
        ([str(tmp_path / "no")], "does not exist"),
        ([str(tmp_path), "--out", "list.txt"], "--out list.txt has another ending than .csv"),
        ([str(tmp_path), "--stats", str(stats)], "s.json does not exist"),
        ([str(tmp_path), "--stats", str(stats), "--channels", "5"], "leave out --channels"),
        (
            [str(tmp_path), "--channels", "0"],
            "channels is 0: it must be",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["data", "check", *words])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line


def test_a_range_from_stats_is_used(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 8, 9)).astype(np.float32)
    source = open_source(values)
    refused = check(source, RGB).bad.values()
    assert all("dino data stats" in reason for _, reason in refused)
    assert len(refused) == 6
    stats, _ = measure(source, PixelFormat(1))
    assert check(open_source(values, stats.format), stats.format).bad == {}
    np.save(tmp_path / "a.npy", values)  # in a file, each image is stretched
    assert check(open_source(tmp_path / "a.npy"), RGB).bad == {}


def test_an_index_out_of_nowhere_is_no_image_error(tmp_path: Path) -> None:
    class Broken(Source):
        def __len__(self) -> int:
            return 1

        def path(self, index: int) -> str:
            return "the first"

        def __getitem__(self, index: int) -> None:
            raise KeyError("nothing")

    with pytest.raises(RuntimeError, match="reading the first failed: KeyError"):
        check(Broken(), RGB)
    with pytest.raises(UserError, match="channels is 0"):
        check(Broken(), PixelFormat(0))
