"""Patch features of images: sizes, blocks, and images that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fakes import PatchColors
from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.images.patch_grid import resize_to_patches
from dino.data.images.pixel_format import RGB
from dino.data.sources.named_inputs import NamedInput, named_inputs
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.create import create
from dino.show.patch_maps import PatchMaps


def vit(depth: int = 3) -> Any:
    torch.manual_seed(0)
    return create(
        "vit_tiny", embed_dim=12, depth=depth, heads=3, patch_size=4, image_size=16
    ).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index, size in enumerate([(20, 30), (16, 16), (9, 70)]):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def test_an_image_covers_complete_patches_and_keeps_its_ratio(photos: Path) -> None:
    maps = PatchMaps(vit(), named_inputs([str(photos)], RGB), size=16)
    shapes = [(one.tokens.shape, one.picture.size) for i in range(3) if (one := maps.read(i))]
    assert shapes == [
        ((12, 4, 6), (30, 20)),
        ((12, 4, 4), (16, 16)),
        ((12, 4, 31), (70, 9)),  # 7.8
    ]


def test_tokens_are_those_of_the_block(photos: Path) -> None:
    network, inputs = vit(), named_inputs([str(photos)], RGB)
    pixels = resize_to_patches(read_picture(photos / "0.png"), 16, 4, keep_aspect=True)
    transform = network.preprocessing
    images = normalize(pixels, transform.mean, transform.std)
    expected = network.features(images[None], last=3).patches[:, 0]
    for block, index in ((-1, 2), (2, 2), (0, 0), (-3, 0), (1, 1)):
        maps = PatchMaps(network, inputs, 16, block)
        found = maps.read(0)
        assert found is not None
        assert torch.allclose(found.tokens, expected[index])
        assert maps.block == index
    for block in (3, -4):
        with pytest.raises(UserError, match=rf"no block {block}: the features of 3"):
            PatchMaps(network, inputs, 16, block)


def test_networks_without_blocks_or_patch_size_have_maps(photos: Path) -> None:
    network = PatchColors().eval()
    network.patch_size = None
    one = PatchMaps(network, named_inputs([str(photos)], RGB), 26).read(1)
    assert one is not None
    assert one.tokens.shape == (3, 6, 6)
    with pytest.raises(UserError, match="no block -2"):
        PatchMaps(network, named_inputs([str(photos)], RGB), 26, -2)


def test_cached_maps_are_computed_once(photos: Path) -> None:
    counts: list[int] = []
    maps = PatchMaps(vit(), named_inputs([str(photos)], RGB), 16, advance=counts.append)
    cached = maps.cache([0, 2])
    assert [*map(id, cached)] == [id(maps.read(0)), id(maps.read(2))]
    again = maps.read(0)
    assert again is not None
    assert torch.equal(again.tokens, cached[0].tokens)
    assert counts == [1, 1, 1]


def test_images_that_cannot_be_used_are_skipped_and_counted(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "1.png").write_bytes(b"damaged")
    maps = PatchMaps(vit(), named_inputs([str(photos)], RGB), 16)
    assert len(maps.cache([0, 1])) == 1
    assert maps.read(1) is None
    assert [*maps.skipped] == [1]
    maps.check_usable()
    maps.warn_skipped()
    message = capsys.readouterr().err
    assert "1 of 3 images could not be used" in message
    assert "1.png" in message
    with pytest.raises(
        UserError, match=r"none of 1 images can be used, the first because .*1\.png"
    ):
        PatchMaps(vit(), named_inputs([str(photos)], RGB), 16).cache([1])


def test_impossible_features_are_refused(photos: Path) -> None:
    inputs = named_inputs([str(photos)], RGB)
    with pytest.raises(UserError, match="--size 3 holds no patch of 4 px"):
        PatchMaps(vit(), inputs, 3).read(0)
    with pytest.raises(UserError, match=r"clip\.mp4 is a video"):
        PatchMaps(vit(), [*inputs, NamedInput("clip.mp4", "clip")], 16)
    network = vit()
    network.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        PatchMaps(network, named_inputs([str(photos)], RGB), 16).read(0)
