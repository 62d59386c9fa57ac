"""Files that are no images say what they are and what to do with them."""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers.reading import levels
from PIL import Image

from dino import cli
from dino.data.images.image_errors import ImageError
from dino.data.sources.open import open_source
from dino.files import UserError


def zipped() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("a.jpg", b"x")
    return stream.getvalue()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped(), "it is a zip archive: unpack it and give the folder"),
        (bytes(344) + b"n+1\0" + bytes(99), "it is NIfTI: write its slices as .npy"),
        (b"\x89HDF\r\n\x1a\n", "it is HDF5: "),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: fetch the file"),
        (b"<!DOCTYPE html>", "a web page: download the image again"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a film: write its frames"),
        (b"any text", "its bytes are in no known image format"),
    ],
)
def test_the_format_that_was_found_is_named(content: bytes, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        levels(io.BytesIO(content))
    assert words in str(caught.value)
    assert caught.value.defect == "not an image"


def test_heic_is_read_by_its_extra_or_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"it is a HEIC image: pip install 'dino-ssl\[heic\]'"):
        levels(io.BytesIO(HEIC))
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    colours = np.zeros((64, 48, 3), np.uint8) + np.array([200, 30, 90], np.uint8)
    heif.from_pillow(Image.fromarray(colours)).save(stream := io.BytesIO(), quality=100)
    assert np.abs(levels(stream)[:, 9, 9].astype(int) - (200, 30, 90)).max() <= 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "unpack it and give the folder"),
        ("a.nii.gz", "slices as .npy"),
        ("a.gz", "unpack"),
    ],
)
def test_files_given_as_data_say_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=words) as caught:
        open_source(tmp_path / name)
    assert "is a file" in str(caught.value)


@pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING for a string
def test_a_mixed_folder_says_what_each_is_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(18):
        Image.new("RGB", (30, 20), (number, 9, 9)).save(folder / f"{number:02}.jpg")
    for number in range(5):
        (folder / f"{number}.heic").write_bytes(HEIC)
    (folder / "more.zip").write_bytes(zipped())
    stack = np.zeros((4, 16, 16), np.uint16)
    tifffile.imwrite(
        folder / "z.ome.tif", stack, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack"
    )
    out = tmp_path / "check.csv"
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "check", str(folder), "--out", str(out), "--workers", "0"])
    assert caught.value.code == 1
    summary = json.loads((tmp_path / "check.json").read_text())
    assert (summary["usable"], summary["defects"]) == (18, {"misfit": 6})
    assert summary["left_out"] == {".zip": 1}
    printed = capsys.readouterr()
    assert "left out, no image: .zip (unpack it and give the folder)" in printed.out
    with out.open(newline="") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert reasons["0.heic"] == "it is a HEIC image: pip install 'dino-ssl[heic]'"
    assert reasons["z.ome.tif"].startswith(
        "it is a stack of 4 pages (4 in depth): choose one by --page"
    )
