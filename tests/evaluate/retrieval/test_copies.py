"""Copy detection by complete networks, on strong copies of real photographs made here."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.results import result, result_file
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from dino.cli import main
from dino.data.images.decode import crop_resize, to_tensor
from dino.data.sources.demo import photographs
from dino.data.views.photometric import normalize
from dino.evaluate.retrieval.copies import Copies, average_precisions, run
from dino.evaluate.retrieval.copydays import open_copydays
from dino.features import duplicates
from dino.features.copy_descriptor import cls_gem, descriptor
from dino.files import UserError
from dino.models.create import create
from dino.weights.load import load, save


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def inner(image: Image.Image, share: float) -> Image.Image:
    """The middle of an image, a share of its area."""
    margin = (1 - share**0.5) / 2
    width, height = image.size
    box = (margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)
    return image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]


def overlaid(image: Image.Image) -> Image.Image:
    image = image.copy()
    font = ImageFont.load_default(image.width // 8)
    ImageDraw.Draw(image).text((5, image.height // 3), "NOT MINE", (255, 255, 0), font)
    return image


STRONG: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "crop": lambda image: inner(image, 0.6),
    "flip": ImageOps.mirror,
    "jpeg": lambda image: jpeg(image, 3),
    "text": overlaid,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs, small, by a number."""
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(photographs().values()):
        small = ImageOps.fit(picture, (96, 80))
        small.save(folder / f"{1000 + number}.png")
    return folder


@pytest.fixture(scope="module")
def copydays(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of them and copies of each; the others are `rest`."""
    root = tmp_path_factory.mktemp("copydays")
    for folder in ("original", "strong", "jpegqual/3", "jpegqual/20", "crops/50", "rest"):
        (root / folder).mkdir(parents=True)
    for number, path in enumerate(sorted(photos.iterdir())):
        if number >= 10:
            shutil.copy(path, root / "rest")
            continue
        picture = Image.open(path).convert("RGB")
        picture.save(root / "original" / path.name)
        for quality in (3, 20):
            jpeg(picture, quality).save(root / "jpegqual" / str(quality) / path.name)
        inner(picture, 0.5).save(root / "crops" / "50" / path.name)
        for kind, alter in STRONG.items():
            if (number + len(kind)) % 3:  # not every kind of every photograph
                alter(picture).save(root / "strong" / f"{path.stem}{kind}.png")
    return root


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(1)
    vit = create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, image_size=32)
    save(vit, tmp_path / "run" / "teacher.safetensors")
    return str(tmp_path / "run")


def settings(weights: str, **changes: Any) -> Copies:
    return Copies(weights=weights, **{"size": 32, "workers": 0, "device": "cpu", **changes})


# ------------------------------------------------------------------------------ the descriptor
def test_the_descriptor_of_a_vit_and_of_a_convnet() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    for network in (
        create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8),
        create("resnet50"),
    ):
        network.eval()
        with torch.inference_mode():
            row = cls_gem(network, images)
            feature, maps = network(images), network.features(images).patches[0]
        above = maps.flatten(2).double().clamp(min=1e-6)
        expected = ((above**4).sum(dim=2) / above.shape[2]) ** 0.25
        torch.testing.assert_close(row[:, : network.embed_dim], feature)
        torch.testing.assert_close(row[:, network.embed_dim :], expected.float())


def test_images_are_resized_to_the_squares_of_table_4() -> None:
    base = create("vit_tiny", embed_dim=24, depth=1, heads=2, patch_size=16)
    fine = create("vit_tiny", embed_dim=24, depth=1, heads=2, patch_size=8)
    image = Image.new("RGB", (50, 20), (10, 20, 30))
    assert descriptor(base).transform(image).shape == (3, 224, 224)
    assert descriptor(fine).transform(image).shape == (3, 320, 320)
    assert descriptor(create("resnet50")).transform(image).shape == (3, 224, 224)
    assert descriptor(fine, 64).transform(image).shape == (3, 64, 64)


# ------------------------------------------------------------------------------- the benchmark
def test_only_the_first_twenty_are_found() -> None:
    database = F.normalize(torch.stack([torch.ones(30), torch.arange(30.0)], dim=1), dim=1)
    query = database[:1]
    precisions = average_precisions(query.expand(4, -1), database, [[0], [3], [20], [0, 25]])
    assert precisions == pytest.approx([1.0, 0.125, 0.0, 0.5])


def test_fewer_images_than_twenty() -> None:
    assert average_precisions(torch.eye(3), torch.eye(3), [[0], [1], [0]])[:2] == [1.0, 1.0]


def test_layout(copydays: Path) -> None:
    blocks = open_copydays(copydays)
    names = [block.name for block in blocks]
    assert names == ["strong", "jpegqual/3", "jpegqual/20", "crops/50", "original"]
    strong, originals = blocks[0], blocks[-1].copies
    for index, (origin,) in enumerate(strong.origins):
        copy, original = Path(strong.copies.path(index)), Path(originals.path(origin))
        assert copy.stem[:4] == original.stem
    assert blocks[1].origins == [[index] for index in range(10)]


def expected(weights: str, root: Path, block: str, hidden: bool) -> float:
    """mAP in percent, image by image: each copy has one original."""
    backbone = load(weights)
    statistics = (backbone.preprocessing.mean, backbone.preprocessing.std)

    def feature(path: Path) -> torch.Tensor:
        pixels = to_tensor(Image.open(path).convert("RGB"))
        box = (0, 0, *pixels.shape[1:])
        image = normalize(crop_resize(pixels, box, 32, False), *statistics)
        with torch.inference_mode():
            return F.normalize(cls_gem(backbone, image[None]), dim=1)[0]

    files = sorted((root / "original").iterdir())
    files += sorted((root / "rest").iterdir()) if hidden else []
    database = torch.stack([feature(path) for path in files])
    scores = []
    for copy in sorted((root / block).iterdir()):
        order = (database @ feature(copy)).argsort(descending=True).tolist()
        rank = [files[i].stem for i in order].index(copy.stem[:4])
        scores.append(1.0 if rank == 0 else 0.5 / (rank + 1) if rank < 20 else 0.0)
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_command_equals_a_count_by_hand(
    hidden: bool, weights: str, copydays: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = str(copydays / "rest") if hidden else None
    found = run(
        settings(weights, benchmark=str(copydays), distractors=rest, baseline=True, batch=7)
    )
    assert found.keys() == {"trained", "untrained"}
    for block, score in found["trained"].items():
        assert score == pytest.approx(expected(weights, copydays, block, hidden))
    assert found["trained"]["original"] == 100.0
    assert 30 < found["trained"]["strong"] < 100  # so that the numbers above can differ
    printed = capsys.readouterr().out
    hiding = "8 distractors" if hidden else "0 distractors"
    for word in ("10 originals", hiding, "not whitened", "jpegqual/20", "untrained"):
        assert word in printed
    written = result(weights, "copies")
    assert written["copies"] == found
    strong = written["scores"]["mAP, strong"]
    assert strong == {name: {"percent": of["strong"]} for name, of in found.items()}
    assert written["settings"]["batch"] == 7


def test_whitening_is_learned_from_other_images(
    weights: str, copydays: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(settings(weights, benchmark=str(copydays)))["trained"]
    how: dict[str, Any] = {"benchmark": str(copydays), "whiten_with": str(photos)}
    centred = run(settings(weights, whitening="centred", **how))["trained"]
    assert "centred whitening" in capsys.readouterr().out
    reference = run(settings(weights, **how))["trained"]
    assert "reference whitening" in capsys.readouterr().out
    assert plain != reference
    assert centred != reference
    assert centred["original"] == reference["original"] == 100.0


def test_one_original_and_one_copy_are_enough(weights: str, tmp_path: Path, photos: Path) -> None:
    first = sorted(photos.iterdir())[0]
    for folder in ("original", "strong"):
        (tmp_path / folder).mkdir()
        shutil.copy(first, tmp_path / folder / first.name)
    found = run(settings(weights, benchmark=str(tmp_path)))
    assert found == {"trained": {"strong": 100.0, "original": 100.0}}


def test_wrong_layouts_are_refused(tmp_path: Path, copydays: Path) -> None:
    with pytest.raises(UserError, match="no folder original/"):
        open_copydays(tmp_path)
    shutil.copytree(copydays / "original", tmp_path / "original")
    with pytest.raises(UserError, match="no copies beside its originals"):
        open_copydays(tmp_path)
    shutil.copytree(copydays / "crops", tmp_path / "crops")
    (tmp_path / "crops" / "50" / "1000.png").unlink()
    with pytest.raises(UserError, match=r"crops/50 holds 9 images but original/ 10"):
        open_copydays(tmp_path)
    shutil.copy(copydays / "original" / "1000.png", tmp_path / "crops" / "50")
    (tmp_path / "crops" / "small").mkdir()
    with pytest.raises(UserError, match=r"small in .*crops is no number"):
        open_copydays(tmp_path)
    (tmp_path / "crops" / "small").rmdir()
    shutil.copytree(copydays / "strong", tmp_path / "strong")
    shutil.copy(copydays / "original" / "1000.png", tmp_path / "strong" / "9999x.png")
    with pytest.raises(UserError, match=r"9999x\.png belongs to no original"):
        open_copydays(tmp_path)


# --------------------------------------------------------------------------- a folder of images
def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_duplicates_among_photographs_are_found(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    first = Image.open(photos / "1000.png").convert("RGB")
    first.resize((72, 60)).save(folder / "1000 small.png")
    jpeg(first, 95).save(folder / "1000 again.png")
    shutil.copy(photos / "1005.png", folder / "1005 same.png")
    (folder / "broken.png").write_bytes(b"damaged")
    content = run(settings(weights, data=str(folder)))
    names = [{Path(path).stem for path in group} for group in content["groups"]]
    assert names == [{"1000", "1000 small", "1000 again"}, {"1005", "1005 same"}]
    assert content["images"] == 21
    assert content["skipped"] == [str(folder / "broken.png")]
    assert "2 groups of near duplicates, 5 of 21 images" in capsys.readouterr().out
    rows = read(result_file(weights, "duplicates", ".csv"))
    assert [row["group"] for row in rows] == ["1", "1", "1", "2", "2"]
    assert [row["path"] for row in rows] == [path for group in content["groups"] for path in group]
    assert rows[0]["similarity"] == rows[3]["similarity"] == rows[4]["similarity"] == "1.000000"
    assert all(0.9 <= float(row["similarity"]) <= 1 for row in rows)
    keep = [Path(row["path"]).name for row in rows if row["keep"] == "yes"]
    assert keep == ["1000.png", "1005 same.png"]  # the largest; of equal files the first name
    assert [Path(path).name for path in content["keep"]] == keep
    assert {row["keep"] for row in rows} == {"yes", "no"}
    with Image.open(result_file(weights, "duplicates", ".png")) as sheet:
        assert 3 * 144 < sheet.width < 4 * 144
        assert 2 * 144 < sheet.height < 3 * 144


def test_the_sheet_begins_with_the_copy_to_keep(
    weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    first = Image.open(photos / "1000.png").convert("RGB")
    for side in range(40, 50):
        first.resize((side, side)).save(folder / f"1000 {side}.png")
    first.resize((192, 160)).save(folder / "z large.png")
    sheets = []
    monkeypatch.setattr(duplicates, "save_sheet", lambda *sheet: sheets.append(sheet))
    content = run(settings(weights, data=str(folder), threshold=0.8))
    assert content["keep"] == [str(folder / "z large.png")]
    (_, [row], title) = sheets[0]
    assert "all 1 groups. Framed: the copy to keep, the largest of its group" in title
    assert len(row) == duplicates.SHEET[1]
    assert row[0].caption.startswith("z large.png\nkeep: 192 x 160, 0.")
    assert [cell.frame for cell in row] == ["right"] + [None] * 7
    assert row[-1].caption.endswith(f"\nand {len(content['groups'][0]) - 8} more")


def test_a_folder_of_one_and_the_same_image(weights: str, photos: Path, tmp_path: Path) -> None:
    """No direction varies, so features say nothing; the bytes do."""
    (tmp_path / "same").mkdir()
    for number in range(16):
        shutil.copy(photos / "1005.png", tmp_path / "same" / f"{number}.png")
    content = run(settings(weights, data=str(tmp_path / "same"), batch=5))
    assert [len(group) for group in content["groups"]] == [16]
    rows = read(result_file(weights, "duplicates", ".csv"))
    assert {row["similarity"] for row in rows} == {"1.000000"}


def test_a_folder_without_duplicates(weights: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.json"
    content = run(settings(weights, data=str(photos), threshold=0.999, out=out))
    assert content["groups"] == []
    assert read(out.with_suffix(".csv")) == []
    assert not out.with_suffix(".png").exists()


def test_a_few_images_need_others_to_be_whitened_by(
    weights: str, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    first, second = sorted(photos.iterdir())[:2]
    shutil.copy(second, folder)
    picture = Image.open(first).convert("RGB")
    picture.save(folder / "a.png")
    jpeg(picture, 60).save(folder / "b.png")
    with pytest.raises(UserError, match="cannot be learned from 3 images: give --whiten-with"):
        run(settings(weights, data=str(folder)))
    content = run(settings(weights, data=str(folder), whiten_with=str(photos)))
    assert content["groups"] == [[str(folder / "a.png"), str(folder / "b.png")]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --benchmark"),
        ({"data": "a", "benchmark": "b"}, "either --benchmark"),
        ({"data": "a", "baseline": True}, "--baseline needs --benchmark"),
        ({"data": "a", "distractors": "b"}, "--distractors needs --benchmark"),
        ({"data": "a", "threshold": 85.0}, "threshold is 85.0: it must be a number from -1 to 1"),
        ({"data": "a", "size": 0}, "size is 0"),
        ({"data": "a"}, "a does not exist"),
        ({"benchmark": "a"}, "a has no folder original/"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    options: dict[str, Any], words: str, weights: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(settings(weights, **options))


def test_the_command_line(weights: str, copydays: Path) -> None:
    how = ["--weights", weights, "--workers", "0", "--device", "cpu", "--size", "32"]
    main(["evaluate", "copies", *how, "--benchmark", str(copydays)])
    assert result(weights, "copies")
