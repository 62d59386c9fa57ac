"""Images of the page: their names, sizes and features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino.data.images.decode import to_tensor
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.show.explorer import patches
from dino.show.explorer.patches import check_patches, named_images, patch_features


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def network() -> Backbone:
    return dino.create(
        "vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, image_size=32
    ).eval()


# ------------------------------------------------------------------------------------ the images
def names(images: Any) -> list[str]:
    return [name for name, _ in named_images(images, RGB)]


def test_names_are_the_ends_by_which_paths_differ(tmp_path: Path) -> None:
    for place in ("a/x", "a/y", "b/x"):
        (tmp_path / place).mkdir(parents=True)
        noise(8, 8).save(tmp_path / place / "1.png")
    noise(8, 8).save(tmp_path / "2.png")
    files = [tmp_path / name for name in ("a/x/1.png", "2.png")]
    assert names(files) == ["1.png", "2.png"]
    assert names([tmp_path / "a/x/1.png", str(tmp_path / "a/y/1.png")]) == ["x/1.png", "y/1.png"]
    assert names(tmp_path / "a") == ["x/1.png", "y/1.png"]
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a/x/1.png", "y/1.png", "b/x/1.png"]
    assert names(str(tmp_path / "a" / "*" / "*.png")) == ["x/1.png", "y/1.png"]
    assert names([noise(8, 8), files[1], np.zeros((8, 8), np.uint8)]) == [
        *("2.png", "image 1", "image 3")
    ]
    assert names(noise(8, 8)) == ["image 1"]
    assert names(files[1]) == ["2.png"]


def test_too_many_images_and_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "MOST", 2)
    for images, count in (([noise(8, 8)] * 3, 3), ([], 0)):
        with pytest.raises(UserError, match=f"{count} images are given: a page takes from 1 to 2"):
            named_images(images, RGB)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none.jpg'} does not exist")):
        named_images([tmp_path / "none.jpg"], RGB)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'text.jpg'} cannot be read")):
        named_images([tmp_path / "text.jpg"], RGB)
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"film\.mp4 is a video"):
        named_images([tmp_path / "film.mp4"], RGB)


def test_more_patches_than_a_page_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PATCHES", 8 * 8 * 8)
    panorama, square = ("", noise(800, 100)), ("", noise(20, 20))
    check_patches([panorama], 64, 8)
    with pytest.raises(UserError, match=r"have 576 patches, .* takes 512: .* about --size 60"):
        check_patches([panorama, square], 64, 8)
    check_patches([panorama, square], 56, 8)


# ---------------------------------------------------------------------------------- the features
def test_features_are_those_of_the_network(network: Backbone) -> None:
    image = noise(48, 32)
    found = patch_features(network, "name", image, 32)
    transform = network.preprocessing
    inputs = normalize(to_tensor(image), transform.mean, transform.std)[None]
    with torch.inference_mode():
        expected = network.features(inputs, attention=True)  # of which only one row is computed
    assert found.name == "name"
    assert found.picture.size == (48, 32)
    assert found.attention is not None
    assert torch.allclose(found.features, expected.patches[0, 0], atol=1e-5)
    assert torch.allclose(found.attention, expected.attention_maps[0], atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (100, 100, (6, 6)),
        (100, 50, (6, 12)),
        (50, 100, (12, 6)),
        (100, 60, (6, 10)),
        (900, 10, (6, 50)),
    ],
)
def test_the_shorter_side_has_the_size_and_nothing_is_cropped(
    width: int, height: int, grid: tuple[int, int], network: Backbone
) -> None:
    image = noise(width, height)
    assert patch_features(network, "", image, 50).features.shape == (24, *grid)
    image.paste("white", (width - 5, 0, width, height))  # the last pixels count
    changed = patch_features(network, "", image, 50)
    assert not torch.equal(
        changed.features, patch_features(network, "", noise(width, height), 50)[2]
    )


def test_a_size_without_a_patch_is_refused(network: Backbone) -> None:
    with pytest.raises(UserError, match="--size 7 holds no patch of 8 px: set it to 8 or more"):
        patch_features(network, "", noise(8, 8), 7)


def test_a_network_that_has_diverged_is_refused(network: Backbone) -> None:
    torch.nn.init.constant_(network.get_parameter("norm.weight"), float("nan"))
    with pytest.raises(UserError, match="NaN or infinity: the network has diverged"):
        patch_features(network, "", noise(8, 8), 8)


def test_a_network_of_one_size_says_so(network: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_size(*_: Any, **__: Any) -> None:
        raise AssertionError("Input height (16) doesn't match model (224)")

    monkeypatch.setattr(network, "features", one_size)
    monkeypatch.setattr(network, "forward", one_size)
    with pytest.raises(UserError, match="takes no images of 16 px"):
        patch_features(network, "", noise(8, 8), 16)


def test_convnets_have_features_without_attention() -> None:
    found = patch_features(dino.create("resnet10t").eval(), "", noise(64, 32), 32)
    assert found.features.shape == (512, 1, 2)
    assert found.attention is None


def test_images_of_other_channels_are_shown_as_their_mean() -> None:
    pixels = PixelFormat(channels=2, low=(0,), high=(100,))
    network = dino.create("vit_tiny", embed_dim=12, depth=1, heads=1, patch_size=8, channels=2)
    network.preprocessing = dino.create("vit_tiny").preprocessing.__class__(
        mean=(0.5, 0.5), std=(0.2, 0.2), pixels=pixels
    )
    values = np.stack([np.full((16, 16), 0), np.full((16, 16), 100)], axis=-1).astype(np.uint16)
    ((_, sample),) = named_images(values, pixels)
    found = patch_features(network.eval(), "", sample, 16)
    assert found.picture.getpixel((3, 3)) == (127, 127, 127)
    assert found.features.shape == (12, 2, 2)
