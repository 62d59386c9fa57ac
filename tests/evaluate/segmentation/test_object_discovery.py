"""`dino objects`: what is written and measured, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fakes import PatchColors
from helpers.pictures import write_plain, write_voc
from helpers.videos import save_mask
from oracle.discovery import decoded
from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.sampler import spread
from dino.evaluate.segmentation.datasets import has_masks, open_scenes, scored_scenes
from dino.evaluate.segmentation.discovery_metrics import agreement, summary
from dino.evaluate.segmentation.normalized_cut import normalized_cut
from dino.evaluate.segmentation.object_discovery import (
    LONGEST,
    SHEET,
    TILE,
    ImageSet,
    ObjectSettings,
    discover,
    discoveries,
    drawn,
    run,
)
from dino.evaluate.segmentation.seed_expansion import seed_expansion
from dino.features.patch_classifiers import PatchExtractor
from dino.files import UserError
from dino.models.attention import mass_mask
from dino.models.create import create
from dino.weights.load import load, save


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    network = create("vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=4, image_size=16)
    save(network, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def settings(weights: str, data: Path, **changes: Any) -> ObjectSettings:
    defaults = {"out": data.parent / "found", "size": 24, "device": "cpu"}
    return ObjectSettings(weights=weights, data=str(data), **{**defaults, **changes})


ROWS = ["normalised cut", "seed expansion", "60% of attention, mean of heads", "the entire image"]


def test_images_with_masks_are_measured(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_plain(tmp_path / "plain", 4)
    save_mask(np.zeros((24, 32), dtype=np.uint8), root / "masks/1.png")  # an image without objects
    found = run(settings(weights, root, baseline=True))
    assert found.keys() == {"trained", "untrained"}
    assert all([*rows] == ROWS for rows in found.values())
    result = json.loads((tmp_path / "vit.safetensors.objects-plain.json").read_text())
    assert result["objects"] == found
    assert (result["evaluation"], result["images"], result["empty"]) == ("objects", 3, 1)
    score = result["scores"]["max F, seed expansion"]["untrained"]
    assert score == {"percent": found["untrained"]["seed expansion"]["max_f"]}
    printed = capsys.readouterr().out
    assert "trained: normalised cut" in printed
    assert f"{found['trained']['the entire image']['iou']:.1f}" in printed
    # The numbers are those of the functions on the same features.
    network = load(weights)
    extractor, scores = PatchExtractor(network, 24), dict[str, list[Any]]()
    for scene in (open_scenes(root, None)[index] for index in (0, 2, 3)):
        picture, ids = scene.read()
        with torch.inference_mode():
            features = network.features(extractor.prepare(picture), attention=True)
        attention = features.attention_maps[0].mean(dim=0)
        expected = [normalized_cut(features.key_maps[0]), seed_expansion(features.key_maps[0])]
        for row, one in zip(ROWS, expected, strict=False):
            scores.setdefault(row, []).append(agreement(one, ids))
        by_row = discoveries(extractor, picture, settings(weights, root), measured=True)
        assert np.array_equal(by_row[ROWS[2]].mask, mass_mask(attention, 0.6).numpy())
        assert by_row[ROWS[3]].mask.all()
    for row, of in scores.items():
        assert found["trained"][row] == pytest.approx(summary(of))


def test_the_file_of_objects_holds_masks_and_boxes_of_the_first_method(
    tmp_path: Path, weights: str
) -> None:
    root = write_plain(tmp_path / "plain", 3)
    run(settings(weights, root, methods=("lost", "ncut"), keep_aspect=True))
    content = json.loads((tmp_path / "found/objects.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [
        f"images/{index}.png" for index in range(3)
    ]
    assert content["info"]["settings"]["methods"] == ["lost", "ncut"]
    assert content["info"]["skipped"] == []
    extractor = PatchExtractor(load(weights), 24, keep_aspect=True)
    for image, one in zip(content["images"], content["annotations"], strict=True):
        assert one["image_id"] == image["id"]
        picture = read_picture(root / image["file_name"])
        features = extractor.backbone.features(extractor.prepare(picture), attention=True)
        mask = seed_expansion(features.key_maps[0].detach()).pixels(24, 32)
        assert np.array_equal(decoded(one["segmentation"]), mask)
        left, top, width, height = one["bbox"]
        assert one["area"] == mask.sum() == mask[top : top + height, left : left + width].sum()
    for name in ("sheet.png", *(f"{index}-object.png" for index in range(3))):
        assert read_picture(tmp_path / "found" / name).width >= 32


def test_images_without_masks_have_objects_and_no_result(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_plain(tmp_path / "plain", 3) / "images"
    (photos / "1.png").write_bytes(b"damaged")
    assert run(settings(weights, photos)) == {}
    assert "1 of 3 images could not be used" in capsys.readouterr().err
    content = json.loads((photos.parent / "found/objects.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.png", "2.png"]
    assert content["info"]["skipped"] == [str(photos / "1.png")]
    assert not [*tmp_path.glob("*.json")]
    single = settings(weights, photos / "0.png")
    run(single)
    assert len(json.loads((single.out / "objects.json").read_text())["images"]) == 1
    with pytest.raises(
        UserError, match=r"none of 1 images can be used, the first because .*1\.png"
    ):
        run(settings(weights, photos / "1.png"))


def test_sheets_show_readable_images(tmp_path: Path, weights: str) -> None:
    photos = write_plain(tmp_path / "plain", 2 * SHEET) / "images"
    sheets = []
    for ending in ("full", "few"):
        chosen = settings(weights, photos, out=tmp_path / ending, methods=("lost",))
        run(chosen)
        with Image.open(chosen.out / "sheet.png") as sheet:
            sheets.append(sheet.size)
        paths = sorted(photos.iterdir(), key=str)  # as they are read
        for index in spread(len(paths), SHEET):  # those of the sheet
            paths[index].write_bytes(b"damaged")
    assert sheets[0][0] > 5 * TILE
    assert sheets[1][0] < 2 * TILE


def test_the_order_of_the_images_does_not_matter(tmp_path: Path, weights: str) -> None:
    scenes = open_scenes(write_plain(tmp_path / "plain", 5), None)

    def found(order: list[int]) -> Any:
        chosen = [scenes[index] for index in order]
        names = [str(scene.image) for scene in chosen]
        images = ImageSet(names, names, lambda i: chosen[i].read())
        return discover(
            load(weights), images, settings(weights, tmp_path), title="", write=False
        ).agreements

    order = [3, 1, 4, 0, 2]
    straight, shuffled = found([*range(5)]), found(order)
    for row in ROWS:
        for place, index in enumerate(order):
            one, other = straight[row][index], shuffled[row][place]
            assert one[:2] == other[:2]
            assert np.array_equal(one.f, other.f)


def test_convnets_have_patches_only(tmp_path: Path) -> None:
    picture = read_picture(write_plain(tmp_path / "plain", 1) / "images/0.png")
    extractor = PatchExtractor(PatchColors().eval(), 24, keep_aspect=True)
    found = discoveries(extractor, picture, settings("w", tmp_path), measured=True)
    assert [*found] == [ROWS[0], ROWS[1], ROWS[3]]
    features = extractor.features(picture)
    assert np.array_equal(found["normalised cut"].mask, normalized_cut(features).mask)
    keys = settings("w", tmp_path, features="keys")
    with pytest.raises(UserError, match="patch colours has no keys: use --features patches"):
        discoveries(extractor, picture, keys, measured=True)


def test_patches_in_place_of_keys(tmp_path: Path, weights: str) -> None:
    picture = read_picture(write_plain(tmp_path / "plain", 1) / "images/0.png")
    extractor = PatchExtractor(load(weights), 24)
    chosen = settings(weights, tmp_path, features="patches", methods=("lost",))
    (found,) = discoveries(extractor, picture, chosen, measured=False).values()
    expected = seed_expansion(extractor.features(picture))
    assert np.array_equal(found.mask, expected.mask)


def test_what_all_patches_have_in_common_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = create("vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=4, image_size=16)
    network.norm.bias.data.fill_(40.0)
    save(network, tmp_path / "alike.safetensors")
    photos = write_plain(tmp_path / "plain", 2) / "images"
    alike = settings(str(tmp_path / "alike.safetensors"), photos, features="patches")
    run(alike)
    message = "2 of 2 objects are the entire image, since all of its patches are alike"
    assert message in " ".join(capsys.readouterr().err.split())
    centred = replace(alike, center=True)
    run(centred)
    assert "entire image" not in capsys.readouterr().err
    extractor = PatchExtractor(load(alike.weights), 24)
    picture = read_picture(photos / "0.png")
    tokens = extractor.features(picture)
    (found,) = discoveries(extractor, picture, centred, measured=False).values()
    expected = normalized_cut(tokens - tokens.mean(dim=(1, 2), keepdim=True))
    assert np.array_equal(found.mask, expected.mask)
    assert not found.mask.all()


def test_overlays_show_the_object_as_it_is_and_the_rest_grey() -> None:
    from dino.evaluate.segmentation.discovered import Discovered

    picture = Image.new("RGB", (2 * LONGEST, LONGEST), (200, 30, 30))
    mask = np.array([[False, False], [False, True]])
    overlay = drawn(picture, Discovered(mask, mask * 1.0))
    assert overlay.size == (LONGEST, LONGEST // 2)
    assert overlay.getpixel((700, 400)) == (200, 30, 30)
    red, green, blue = overlay.getpixel((100, 100))
    assert red == green == blue < 60
    assert picture.size == (2 * LONGEST, LONGEST)


def test_folders_with_masks_are_recognised(tmp_path: Path) -> None:
    plain, voc = write_plain(tmp_path / "plain", 2), write_voc(tmp_path / "voc")
    assert has_masks(plain)
    assert has_masks(voc)
    assert not has_masks(plain / "images")
    assert [scene.image.stem for scene in scored_scenes(voc, "val")] == ["3", "4"]
    assert len(scored_scenes(plain, "val")) == 2
    (plain / "val.txt").write_text("1\n")
    assert [scene.image.stem for scene in scored_scenes(plain, "val")] == ["1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ()}, "--methods must name ncut or lost"),
        ({"methods": ("ncut", "ncut")}, "each once"),
        ({"size": 3}, "--size 3 holds no patch of 4 px"),
        ({"baseline": True}, "--baseline and --compare need masks"),
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"out": Path("inside")}, "lies in the folder of images"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, weights: str, changes: dict[str, Any], words: str
) -> None:
    photos = write_plain(tmp_path / "plain", 1) / "images"
    if "out" in changes:
        changes = {"out": photos / changes["out"]}
    with pytest.raises(UserError, match=words):
        run(settings(weights, photos, **changes))


def test_masks_without_objects_are_refused(tmp_path: Path, weights: str) -> None:
    root = write_plain(tmp_path / "plain", 1)
    save_mask(np.zeros((24, 32), dtype=np.uint8), root / "masks/0.png")
    with pytest.raises(UserError, match=r"none of the masks, such as .*0\.png, holds an object"):
        run(settings(weights, root))
