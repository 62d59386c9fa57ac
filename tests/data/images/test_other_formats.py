"""Files that are no images say what they are and what to do with them."""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from helpers.reading import levels, misfit
from PIL import Image

from dino import cli
from dino.data.images.bit_depth import Stored
from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.files import UserError


def zipped() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("a.jpg", b"x")
    return stream.getvalue()


DEEP = np.arange(16 * 20, dtype=np.uint16).reshape(16, 20)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (imagecodecs.jpeg8_encode(DEEP, level=95, bitspersample=12), "it is JPEG of 12 bits"),
        (imagecodecs.jpeg8_encode(DEEP, lossless=True, bitspersample=16), "lossless JPEG of 16"),
        (imagecodecs.jpegls_encode(DEEP), "it is JPEG-LS"),
        (b"PF\n2 1\n-1.0\n" + bytes(24), "it is colour PFM"),
        (b"BM" + bytes(12) + b"\x42" + bytes(90), "Unsupported BMP header type"),
    ],
)
def test_kinds_that_pillow_lacks_are_named_with_a_remedy(content: bytes, words: str) -> None:
    found = misfit(io.BytesIO(content))
    assert words in found
    assert "convert it to PNG" in found


@pytest.mark.parametrize(("form", "keep"), [("PNG", 12), ("GIF", 7), ("JPEG2000", 20)])
def test_a_damaged_header_is_damaged_and_named(form: str, keep: int) -> None:
    Image.new("RGB", (20, 16)).save(stream := io.BytesIO(), form)
    content = stream.getvalue()[:keep] + bytes([255]) * 200
    with pytest.raises(ImageError) as caught:
        levels(io.BytesIO(content))
    assert caught.value.defect in ("damaged", "too large")


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_heic_keeps_its_bits(bits: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    monkeypatch.setattr(heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    values = np.full((64, 48, channels), 2**bits - 1, np.uint16)
    values[:32, :, :3] = np.array([2**bits // 5, 2**bits // 3, 2**bits // 2])[:channels]
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    mode = mode if bits == 8 else {"L": "I;16"}.get(mode, f"{mode};16")
    stored = values.astype(np.uint8) if bits == 8 else values << (16 - bits)
    heif.from_bytes(mode, (48, 64), stored.tobytes()).save(file := io.BytesIO(), quality=-1)
    with open_image(file, pixels=PixelFormat(channels)) as image:
        assert image.stored == Stored(channels, bits, False)
        assert image.size == (64, 48)
        found = image.values()
    assert found.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert np.abs(found[:, 9, 9] - values[9, 9].astype(float)).max() <= 2**bits / 64
    assert np.abs(levels(file)[:, 50, 9] - 255.0).max() <= 2


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
