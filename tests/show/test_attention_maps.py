"""The command `dino attention`: files, numbers, and one sentence for each mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import scene
from helpers.videos import frame, picture, write_video
from PIL import Image

from dino import cli
from dino.data.images.patch_grid import resize_to_patches
from dino.data.images.pixel_format import PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.data.views.photometric import normalize
from dino.models.attention import mass_mask
from dino.models.create import create
from dino.show.attention_maps import Viewer
from dino.show.attention_pictures import HeadMaps, Shown
from dino.weights.load import load, save

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights `W` of 3 heads, `photos/` and a video, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vit = create("vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=4, image_size=16)
    for name, parameter in vit.named_parameters():  # the published init attends evenly
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save(vit, Path("W"))
    Path("photos").mkdir()
    for seed in range(3):
        picture(scene(seed)).save(f"photos/{seed}.png")


def run(words: str) -> dict[str, Any]:
    """What the command wrote to the JSON in `out`."""
    cli.main(["attention", *shlex.split(words), "--out", "out", "--device", "cpu"])
    return json.loads(Path("out/attention.json").read_text())


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command ends, which wrote nothing."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["attention", *shlex.split(words), "--out", "out", "--device", "cpu"])
    assert caught.value.code == 2
    assert not Path("out").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def files() -> list[str]:
    return sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.*"))


def opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def matrix(path: str, size: int = 16, keep_aspect: bool = True, block: int = -1) -> torch.Tensor:
    """The attention [heads, T, T] to an image, from the full matrix."""
    vit = load("W")
    pixels = resize_to_patches(opened(path).convert("RGB"), size, 4, keep_aspect)
    images = normalize(pixels, vit.preprocessing.mean, vit.preprocessing.std)[None]
    with torch.inference_mode():
        found = vit.features(images, attention=block).attention
    assert found is not None
    return found[0]


# ------------------------------------------------------------------------------------- images
def test_by_default_a_sheet_for_each_image_and_one_of_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = run("W photos --size 16")
    sheets = ["0-sheet.png", "1-sheet.png", "2-sheet.png"]
    assert files() == [*sheets, "attention.json", "sheet.png"]
    out, err = capsys.readouterr()
    names = [*sheets, "sheet.png", "attention.json"]
    assert out.splitlines() == [f"out/{name}" for name in names]
    assert err.startswith("next: open the pictures in out")
    assert [one["path"] for one in content["shown"]] == [f"photos/{seed}.png" for seed in range(3)]
    assert content["sheets"] == ["out/sheet.png"]
    assert content["settings"]["mass"] == 0.6
    assert content["weights"]["architecture"]["patch_size"] == 4


def test_one_image_has_no_sheet_of_all() -> None:
    run("W photos/1.png --size 16")
    assert files() == ["1-sheet.png", "attention.json"]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("--size 16", {}),
        ("--block 0 --size 24", {"block": 0, "size": 24}),
        ("--size 16 --no-keep-aspect --mass 0.3", {"keep_aspect": False}),
    ],
)
def test_arrays_hold_the_attention_and_its_masks(options: str, arguments: dict[str, Any]) -> None:
    content = run(f"W photos/1.png --arrays {options}")
    arrays = np.load("out/1.npz")
    full = matrix("photos/1.png", **arguments)
    height, width = content["shown"][0]["grid"]
    expected = full[:, 0, 1:].unflatten(1, (height, width))
    np.testing.assert_allclose(arrays["attention"], expected, rtol=0, atol=1e-6)
    mass = 0.3 if "0.3" in options else 0.6
    masks = mass_mask(torch.from_numpy(arrays["attention"]), mass)
    assert np.array_equal(arrays["masks"], masks)
    assert arrays["heads"].tolist() == [0, 1, 2]
    areas = content["shown"][0]["mask_areas"]
    assert areas == {
        "mean": pytest.approx(
            mass_mask(torch.from_numpy(arrays["attention"]).mean(dim=0), mass).double().mean()
        ),
        **{f"head{head}": pytest.approx(mask.double().mean()) for head, mask in enumerate(masks)},
    }
    best = content["shown"][0]["most_concentrated_head"]
    assert areas[f"head{best}"] == min(areas[f"head{head}"] for head in range(3))


@pytest.mark.parametrize(("point", "patch"), [("0,0", 0), ("31,23", 19), ("17,9", 7), ("6,6", 5)])
def test_the_query_is_the_patch_at_the_pixel(point: str, patch: int) -> None:
    """32 x 24 pixels, which are resized to 5 x 4 patches."""
    content = run(f"W photos/1.png --size 16 --arrays --query {point}")
    assert content["shown"][0]["grid"] == [4, 5]
    expected = matrix("photos/1.png")[:, 1 + patch, 1:].unflatten(1, (4, 5))
    np.testing.assert_allclose(np.load("out/1.npz")["attention"], expected, rtol=0, atol=1e-6)


def test_only_the_heads_that_are_named() -> None:
    content = run("W photos/1.png --size 16 --arrays --heads 2 0 2 --write heads masks")
    heads = ("head0-mask.png", "head0.png", "head2-mask.png", "head2.png", "mean-mask.png")
    assert files() == [*(f"1-{name}" for name in heads), "1.npz", "attention.json"]
    arrays = np.load("out/1.npz")
    assert arrays["heads"].tolist() == [2, 0]
    expected = matrix("photos/1.png")[[2, 0], 0, 1:].unflatten(1, (4, 5))
    np.testing.assert_allclose(arrays["attention"], expected, rtol=0, atol=1e-6)
    assert content["shown"][0]["mask_areas"].keys() == {"mean", "head2", "head0"}


def test_pictures_have_the_size_of_the_image_and_masks_no_legend() -> None:
    run("W photos/1.png --size 16 --write mean masks --arrays")
    mask = opened("out/1-head1-mask.png")
    assert (mask.mode, mask.size) == ("L", (32, 24))
    large = Image.fromarray(np.load("out/1.npz")["masks"][1].astype(np.uint8) * 255)
    assert mask.tobytes() == large.resize((32, 24), Image.Resampling.NEAREST).tobytes()
    assert opened("out/1-mean.png").height > 24  # its legend is below it
    run("W photos/1.png --size 16 --write mean --no-legend")
    assert opened("out/1-mean.png").size == (32, 24)


def test_many_images_have_several_pages() -> None:
    for seed in range(3, 13):
        picture(scene(seed)).save(f"photos/{seed}.png")
    Path("photos/5.png").write_bytes(b"none")
    content = run("W photos --size 8")
    assert content["sheets"] == ["out/sheet.png"]
    assert len(content["shown"]) == 12
    Path("photos/5.png").write_bytes(Path("photos/4.png").read_bytes())
    content = run("W photos --size 8")
    assert content["sheets"] == ["out/sheet.png", "out/sheet-2.png"]
    first, second = (opened(path).height for path in content["sheets"])
    assert first > 5 * second


def test_images_that_cannot_be_read_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/2.png").write_bytes(b"none")
    content = run("W photos --size 16")
    assert content["skipped"] == ["photos/2.png"]
    assert len(content["shown"]) == 2
    assert "1 of 3 images cannot be used, the first: photos/2.png" in capsys.readouterr().err


def test_networks_for_other_channels() -> None:
    transform = Preprocessing(mean=(0.5,) * 5, std=(0.2,) * 5, pixels=PixelFormat(5))
    sizes = {"embed_dim": 12, "depth": 1, "heads": 2, "patch_size": 4}
    save(create("vit_tiny", channels=5, preprocessing=transform, **sizes), Path("W5"))
    levels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 5), dtype=np.uint8)
    np.save("many.npy", levels)
    content = run("W5 many.npy --size 16 --write mean composite")
    assert content["shown"][2]["path"] == "image 2 of many.npy"
    assert Path("out/image 2 of many-composite.png").exists()


# ------------------------------------------------------------------------------------- videos
def frames(count: int = 5) -> list[Image.Image]:
    return [picture(frame(time, [1, 2])) for time in range(count)]


def test_a_video_becomes_a_video() -> None:
    from dino.show.video_frames import open_video, read_frames

    write_video(Path("clip.mp4"), frames())
    content = run("W clip.mp4 --size 16")
    assert files() == ["attention.json", "clip-mean.mp4"]
    (shown,) = content["shown"]
    assert (shown["frames"], shown["frames_per_second"]) == (5, 25)
    found = open_video("out/clip-mean.mp4")
    assert (found.size, found.frames, found.rate) == ((40, 32), 5, 25)
    # Each frame is shown as the image that it is.
    for number, one in enumerate(read_frames("clip.mp4")):
        one.picture.save(f"f{number}.png")
    run("W f0.png f1.png f2.png f3.png f4.png --size 16 --write mean --no-legend")
    run("W clip.mp4 --size 16 --no-legend")
    for number, one in enumerate(read_frames("out/clip-mean.mp4")):
        expected = np.asarray(opened(f"out/f{number}-mean.png")).astype(float)
        assert np.abs(expected - np.asarray(one.picture)).mean() < 8


def test_videos_and_images_together() -> None:
    write_video(Path("clip.mp4"), frames())
    content = run("W clip.mp4 photos/0.png --size 16 --write sheet best masks --heads 0 2")
    names = ["best", "head0-mask", "head2-mask", "mean-mask"]
    expected = [f"{stem}-{name}" for stem in ("0", "clip") for name in names]
    found = sorted(name.rpartition(".")[0] for name in files())
    assert found == sorted([*expected, "0-sheet", "attention"])
    assert [one["path"] for one in content["shown"]] == ["photos/0.png", "clip.mp4"]


def test_the_head_of_the_first_frame_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = iter((1, 0, 2))

    def look(self: Viewer, sample: Image.Image) -> HeadMaps:
        maps = torch.ones(3, 4, 5)
        maps[next(heads), 0, 0] = 100  # the most concentrated
        return HeadMaps(maps, [0, 1, 2], 0.6)

    def shown(image: Any, found: HeadMaps, kinds: Any, query: Any, best: int) -> Any:
        places.append((found.best, best))
        return iter([Shown("best", image)])

    places: list[tuple[int, int]] = []
    monkeypatch.setattr(Viewer, "look", look)
    monkeypatch.setattr("dino.show.attention_pictures.pictures", shown)
    write_video(Path("clip.mp4"), frames(3))
    content = run("W clip.mp4 --write best")
    assert places == [(1, 1), (0, 1), (2, 1)]
    assert content["shown"][0]["most_concentrated_head"] == 1


# ----------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("W photos/9.png", "photos/9.png does not exist: check the name"),
        ("W nothing", "nothing does not exist: give --data a folder of images"),
        ("nothing photos", "nothing"),
        ("W", "needs --data: for example dino attention W photo.jpg --out out"),
        ("W photos --heads 3", "there is no head 3: the network has heads 0 to 2"),
        ("W photos --block 2", "there is no block 2: the network has 2"),
        ("W photos --query 5", "it must be X,Y, a column and a row in pixels"),
        ("W photos --query 32,0", "--query 32,0 lies outside of photos/0.png, whose last pixel is"),
        ("W photos --query 0,24", "whose last pixel is 31,23"),
        ("W photos --size 3", "--size 3 holds no patch of 4 px"),
        ("W photos --mass 1", "mass is 1"),
        ("W photos/0.png photos", "is named twice: name it once"),
        ("W clip.mp4 --write sheet", "--write sheet is for images"),
        ("W clip.mp4 --arrays", "--arrays is for images"),
        ("W bad.mp4", "bad.mp4 cannot be read as a video ("),
        ("W clip.mp4 --query 40,0", "outside of clip.mp4, whose last pixel is 39,31"),
        ("R photos", "resnet10t has no CLS attention: use a vit_tiny, vit_small or vit_base"),
        ("W bad.png", "bad.png cannot be read as an image"),
    ],
)
def test_mistakes(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(Path("clip.mp4"), frames(2))
    Path("bad.mp4").write_bytes(b"none")
    Path("bad.png").write_bytes(b"none")
    save(create("resnet10t"), Path("R"))
    assert sentence in refused(words, capsys)


def test_the_output_may_not_lie_among_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["attention", "W", "photos", "--out", "photos/out"])
    assert "lies in the folder of images photos" in capsys.readouterr().err


def test_a_network_that_has_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    vit = load("W")
    torch.nn.init.constant_(vit.state_dict()["pos_embed"], torch.nan)
    save(vit, Path("W"))
    assert "the network has diverged" in refused("W photos --size 16", capsys)
