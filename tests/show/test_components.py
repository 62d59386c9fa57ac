"""`dino components`: the same pictures from a saved basis, and what is written and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino import cli
from dino.data.images.highlight import DIM
from dino.data.images.map_overlay import CATEGORIES
from dino.data.sampler import spread
from dino.files import UserError
from dino.models.create import create
from dino.show.component_pictures import component_picture, part_picture, with_legend
from dino.show.components import PER_ROW, SHEET, ComponentSettings, run
from dino.weights.load import save


def write_photos(folder: Path, seed: int, count: int = 3) -> Path:
    """Noise with a brighter square."""
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng((seed, index)).integers(0, 100, (32, 40, 3), dtype=np.uint8)
        pixels[8:24, 8 + 4 * index : 24 + 4 * index] += 120
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    network = create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=4, image_size=16)
    save(network, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def settings(weights: str, data: Path, out: str, **changes: Any) -> ComponentSettings:
    place = data.parent / out
    return ComponentSettings(
        weights=weights, data=(str(data),), out=place, device="cpu", **{"size": 32, **changes}
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-*.png")}


@pytest.mark.parametrize(
    "options", [{}, {"foreground": True, "parts": 3}, {"parts": 2, "block": 0}]
)
def test_a_saved_basis_gives_the_same_pictures_bit_for_bit(
    tmp_path: Path, weights: str, options: dict[str, Any]
) -> None:
    photos, basis = write_photos(tmp_path / "photos", 0), tmp_path / "basis.safetensors"
    run(settings(weights, photos, "first", save_basis=basis, **options))
    first = pictures(tmp_path / "first")
    assert len(first) == 3 * (2 if "parts" in options else 1)
    # The basis says how the features were made, and what is shown.
    run(settings(weights, photos, "again", basis=basis, size=None))
    assert pictures(tmp_path / "again") == first
    run(settings(weights, photos, "stated", basis=basis, **options))
    assert pictures(tmp_path / "stated") == first
    # An image has the same picture without the others, and among images of another folder.
    others = write_photos(tmp_path / "others", 1)
    shutil.copy(photos / "1.png", others / "1.png")
    run(settings(weights, others, "second", basis=basis, size=None))
    second = pictures(tmp_path / "second")
    assert second["1-components.png"] == first["1-components.png"]
    assert second["0-components.png"] != first["0-components.png"]
    run(settings(weights, photos / "2.png", "../alone", basis=basis, size=None))
    assert pictures(tmp_path / "alone") == {
        name: content for name, content in first.items() if name.startswith("2-")
    }


def test_what_is_written(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos", 0)
    (photos / "1.png").write_bytes(b"damaged")
    content = run(settings(weights, photos, "out", parts=2, foreground=True, arrays=True))
    out = tmp_path / "out"
    assert json.loads((out / "components.json").read_text()) == content
    written = ("0-components.png", "0-parts.png", "0.npz")
    assert content["shown"][0] == {
        "path": str(photos / "0.png"),
        "grid": [8, 10],
        "files": [str(out / name) for name in written],
    }
    assert content["skipped"] == [str(photos / "1.png")]
    assert content["basis"]["images"] == 2
    assert 0 < sum(content["basis"]["variance"]) <= 1
    assert content["settings"]["parts"] == 2
    files = [name for facts in content["shown"] for name in facts["files"]]
    others = [str(out / name) for name in ("sheet.png", "components.json")]
    assert {str(path) for path in out.iterdir()} == {*files, *others}
    printed, errors = capsys.readouterr()
    assert printed.split() == [*files, *others]
    assert "1 of 3 images could not be used" in errors
    with np.load(out / "0.npz") as file:
        arrays = dict(file)
    assert {name: arrays[name].shape for name in arrays} == {
        "components": (8, 10, 3),
        "colors": (8, 10, 3),
        "foreground": (8, 10),
        "parts": (8, 10),
    }
    with Image.open(out / "0-components.png") as picture:
        assert picture.size == (40, 32)  # of the original image
        shown, mask = np.asarray(picture)[2::4, 2::4], arrays["foreground"]
    assert np.array_equal(shown[mask], arrays["colors"][mask])
    assert (np.ptp(shown[~mask].astype(int), axis=1) == 0).all()  # grey


def test_the_basis_is_of_some_of_many_images(tmp_path: Path, weights: str) -> None:
    photos = write_photos(tmp_path / "photos", 0, count=5)
    content = run(settings(weights, photos, "out", fit_images=2))
    assert content["basis"]["images"] == 2
    assert len(content["shown"]) == 5


def test_the_sheet_shows_some_of_many_images(tmp_path: Path, weights: str) -> None:
    photos = write_photos(tmp_path / "photos", 0, count=2 * SHEET)
    sizes = []
    for ending in ("full", "few"):
        run(settings(weights, photos, ending, size=8))
        with Image.open(tmp_path / ending / "sheet.png") as sheet:
            sizes.append(sheet.height)
        paths = sorted(photos.iterdir(), key=str)  # as they are read
        for index in spread(len(paths), SHEET):  # those of the sheet
            paths[index].write_bytes(b"damaged")
    assert sizes[0] > (SHEET / PER_ROW - 1) * sizes[1] / 2
    assert sizes[1] < sizes[0] / 2.5  # both with a title and a legend


def test_convnets_have_components(tmp_path: Path) -> None:
    save(create("resnet10t", image_size=32), tmp_path / "net.safetensors")
    photos = write_photos(tmp_path / "photos", 0)
    content = run(settings(str(tmp_path / "net.safetensors"), photos, "out", size=64, parts=2))
    with Image.open(tmp_path / "out/0-components.png") as picture:
        assert picture.size == (40, 32)
    assert content["basis"]["block"] == 0
    assert content["shown"][0]["grid"] == [2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"foreground": True}, "was written with another --foreground"),
        ({"parts": 2}, "was written with another --parts"),
        ({"block": -2}, "was written with another --block"),
        ({"save_basis": Path("other.safetensors")}, "leave one out"),
    ],
)
def test_a_basis_keeps_what_it_was_written_with(
    tmp_path: Path, weights: str, changes: dict[str, Any], words: str
) -> None:
    photos, basis = write_photos(tmp_path / "photos", 0), tmp_path / "basis.safetensors"
    run(settings(weights, photos, "out", save_basis=basis, parts=3))
    with pytest.raises(UserError, match=words):
        run(settings(weights, photos, "out", basis=basis, **changes))
    run(settings(weights, photos, "out", basis=basis, block=-1, parts=3))


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 0)
    for changes, words in (
        ({"save_basis": Path("b.pt")}, "--save-basis b.pt has another ending than .safetensors"),
        ({"save_basis": photos / "b.safetensors"}, "--save-basis .* lies in the folder of images"),
        ({"parts": 8}, "parts is 8"),
        ({"size": 0}, "size is 0"),
    ):
        with pytest.raises(UserError, match=words):
            run(settings("no weights", photos, "out", **changes))
    with pytest.raises(UserError, match="lies in the folder of images"):
        run(settings("no weights", photos, "photos/out"))


def test_the_command_names_the_next_one(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos", 0, count=1)
    words = [weights, str(photos), "--out", str(tmp_path / "out"), "--size", "16"]
    cli.main(["components", *words])
    assert f"next: open {tmp_path / 'out/sheet.png'}" in capsys.readouterr().err
    basis = str(tmp_path / "b.safetensors")
    cli.main(["components", *words, "--save-basis", basis])
    assert f"--basis {basis}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- pictures
def test_pictures_by_hand() -> None:
    photo = Image.new("RGB", (4, 2), (100, 100, 100))
    colors = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    picture = component_picture(photo, colors, np.array([[True, False]]))
    assert picture.getpixel((1, 1)) == (255, 0, 0)
    assert picture.getpixel((2, 0)) == (round(DIM * 100),) * 3
    parts = part_picture(photo, np.array([[1, 0]], dtype=np.uint8))
    for x, number in ((0, 1), (3, 0)):
        color = np.array(CATEGORIES[number])
        assert np.abs(parts.getpixel((x, 0)) - (0.3 * 100 + 0.7 * color)).max() <= 1


@pytest.mark.parametrize("parts", [2, len(CATEGORIES)])
def test_legends_show_every_color(parts: int) -> None:
    picture = with_legend(Image.new("RGB", (300, 10)), parts, 16)
    pixels = np.asarray(picture)[10:].reshape(-1, 3)
    for number, color in enumerate(CATEGORIES):
        assert ((pixels == color).all(axis=1).sum() >= 100) == (number < parts)
    assert with_legend(picture, 0, 16) is picture
