"""`dino data preview`: what it shows is what training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import cli
from dino.data.commands.preview import ENLARGED, TILE, make_rows, preview_sheet
from dino.data.images.decode import as_pixels, read_image, to_tensor
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD, PixelFormat
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.demo import photographs
from dino.data.sources.open import open_source
from dino.data.views.photometric import augment
from dino.data.views.view_spec import ViewSettings

pytestmark = pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING for a string

SPECS = ViewSettings(global_size=48, local_count=3, local_size=16).specs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for name, picture in list(photographs().items())[:6]:
        picture.resize((300, 200)).save(root / f"{name}.jpg")
    return root


def test_the_views_are_those_of_a_run(folder: Path) -> None:
    """Of the same seed and epoch, taken from the batches that its loader makes."""
    source = open_source(folder)
    rows, skipped = make_rows(source, SPECS, images=3, epoch=1, seed=7)
    assert skipped == []
    assert [Path(row.name).stem for row in rows] == ["brick", "cell", "china"]
    sampler = EpochSampler(len(source), 2, seed=7, start_step=3, stop_step=6)
    found = 0
    for batch in PretrainLoader(source, SPECS, sampler, seed=7):
        assert batch.epoch == 1
        for place, index in enumerate(batch.index.tolist()):
            for row in rows:
                if row.name != source.path(index):
                    continue
                found += 1
                pictures = [
                    augment(
                        group.images[:, place], group.params[:, place], IMAGENET_MEAN, IMAGENET_STD
                    )
                    for group in batch.groups
                ]
                views = [view for group in pictures for view in group]
                params = [list(p) for group in batch.groups for p in group.params[:, place]]
                for view, trained, numbers in zip(row.views, views, params, strict=True):
                    assert numbers == pytest.approx(view.params.row(), rel=1e-6)
                    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[:, :, None, None]
                    shown = to_tensor(view.picture) / 255
                    assert ((trained * std + mean) - shown).abs().max() <= 0.51 / 255
    assert found == 3


def test_captions_say_what_was_done(folder: Path) -> None:
    sure = [
        type(spec)(
            name=spec.name, count=spec.count, size=spec.size, scale=spec.scale,
            flip=1, jitter=1, grey=1, blur=1, solarize=1,
        )
        for spec in SPECS
    ]  # fmt: skip
    never = [
        type(spec)(
            name=spec.name, count=spec.count, size=spec.size, scale=spec.scale,
            flip=0, jitter=0, grey=0, blur=0,
        )
        for spec in SPECS
    ]  # fmt: skip
    [row], _ = make_rows(open_source(folder), sure, images=1)
    view = row.views[0]
    top, left, height, width = view.params.box
    first, flipped, *jitter, grey, blur, solarized = view.caption()
    assert first == f"{width} x {height} at {left}, {top}"
    assert (flipped, grey, solarized) == ("mirrored", "grey", "solarized from 128")
    assert blur == f"blur, sigma {view.params.sigma:.2f}"
    assert sorted(line.split()[0] for line in jitter) == [
        *("brightness", "contrast", "hue", "saturation")
    ]
    assert f"contrast {view.params.contrast:.2f}" in jitter
    [row], _ = make_rows(open_source(folder), never, images=1)
    assert len(row.views[0].caption()) == 1
    five = open_source([torch.zeros(5, 60, 60, dtype=torch.uint8)], PixelFormat(5))
    [row], _ = make_rows(five, sure, images=1)
    words = " ".join(row.views[0].caption())
    assert "brightness" in words
    assert not any(word in words for word in ("hue", "saturation", "grey"))


def test_crops_are_drawn_where_they_were_taken(folder: Path) -> None:
    """An unaltered view is what lies in its box."""
    plain = [
        type(spec)(
            name=spec.name, count=spec.count, size=spec.size, scale=spec.scale,
            flip=0, jitter=0, grey=0, blur=0,
        )
        for spec in SPECS
    ]  # fmt: skip
    rows, _ = make_rows(open_source(folder), plain, images=2)
    for row in rows:
        full = as_pixels(read_image(row.name)).float()
        assert row.original.size == (300, 200)
        for view in row.views:
            top, left, height, width = view.params.box
            inside = full[:, top : top + height, left : left + width].mean(dim=(1, 2))
            assert to_tensor(view.picture).float().mean(dim=(1, 2)).allclose(inside, atol=3)


def test_a_sheet_shows_all_views(folder: Path) -> None:
    rows, _ = make_rows(open_source(folder), SPECS, images=2)
    sheet = preview_sheet(rows, "title")
    assert sheet.mode == "RGB"
    assert sheet.width >= 6 * TILE
    pixels = np.asarray(sheet)
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert edge.min() == 255  # nothing is cut off
    enlarged = rows[0].views[2].picture.resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)
    there = np.lib.stride_tricks.sliding_window_view(pixels, (ENLARGED, ENLARGED, 3))[:, :, 0]
    corner = np.asarray(enlarged)[0, 0]
    places = np.argwhere((pixels[: len(there), : there.shape[1]] == corner).all(axis=-1))
    assert any(np.array_equal(there[y, x], np.asarray(enlarged)) for y, x in places)


def test_bad_images_are_replaced_and_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "brick.jpg").write_bytes(b"")
    rows, skipped = make_rows(open_source(tmp_path), SPECS, images=3)
    assert {error.path for error in skipped} == {str(tmp_path / "brick.jpg")}
    assert all(not row.name.endswith("brick.jpg") for row in rows)


# ---------------------------------------------------------------------------------- command
def test_the_command_writes_a_sheet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    cli.main(["data", "preview", str(folder), "demo", "--out", str(out), "--images", "2"])
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as demo:
        assert demo.format == "PNG"
    more = tmp_path / "more.webp"
    words = ["--out", str(more), "--images", "3", "--views.local-count", "1", "--epoch", "2"]
    cli.main(["data", "preview", str(folder), *words])
    with Image.open(more) as small:
        assert small.format == "WEBP"
        assert small.size != demo.size
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "preview", str(folder), "--help"])
    assert caught.value.code == 0
    assert "laptop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--out", "sheet.gif"],
            "--out sheet.gif has another ending than .png, .jpg, .jpeg, .webp",
        ),
        (["--pixels.channels", "5"], "5 channels need as many means and deviations"),
        (["--stats", "nothing.json"], "nothing.json does not exist"),
        (["nonsense"], "unknown recipe 'nonsense'"),
    ],
)
def test_mistakes_of_the_command(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "preview", str(folder), *words])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
