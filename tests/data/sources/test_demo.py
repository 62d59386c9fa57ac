from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dino.data.sources import demo
from dino.data.sources.demo import PHOTOGRAPHS, TILE, DemoTiles, columns, photographs
from dino.data.sources.open import Source, open_source
from dino.files import UserError


def test_every_photograph_is_there_in_colour_and_large_enough() -> None:
    pictures = photographs()
    assert list(pictures) == sorted(PHOTOGRAPHS)
    assert len(pictures) == 18
    assert all(picture.mode == "RGB" for picture in pictures.values())
    assert all(min(picture.size) >= 300 for picture in pictures.values())


def test_photographs_are_a_source() -> None:
    source = demo.DemoPhotographs()
    assert len(source) == len(PHOTOGRAPHS)
    assert source.path(4) == "demo/chelsea"
    assert source[4].tobytes() == photographs()["chelsea"].tobytes()


def test_tiles_are_many_and_balanced() -> None:
    for split, least in (("train", 1000), ("test", 400)):
        tiles = DemoTiles(split)
        assert isinstance(tiles, Source)
        assert len(tiles) >= least
        assert tiles.classes == sorted(PHOTOGRAPHS)
        assert len(set(Counter(tiles.labels).values())) == 1
        assert {tiles[index].size for index in range(len(tiles))} == {(TILE, TILE)}
        assert len({tiles.path(index) for index in range(len(tiles))}) == len(tiles)


def test_a_tile_belongs_to_its_photograph() -> None:
    tiles = DemoTiles("train")
    for index in (0, 500, len(tiles) - 1):
        name = tiles.classes[tiles.labels[index]]
        assert tiles.path(index).startswith(f"demo:{name}/train/")
    with pytest.raises(IndexError):
        tiles[len(tiles)]
    assert tiles[-1].tobytes() == tiles[len(tiles) - 1].tobytes()


def test_training_and_test_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to one side and the margin of a photograph, the other side's tiles stay."""
    before = {split: DemoTiles(split) for split in ("train", "test")}
    for split in ("train", "test"):
        spoilt = {}
        for name, picture in photographs().items():
            first, last = columns(picture.width, split)
            noise = np.random.default_rng(0).integers(
                0, 256, (picture.height, picture.width, 3), dtype=np.uint8
            )
            noise[:, first:last] = np.asarray(picture)[:, first:last]
            spoilt[name] = Image.fromarray(noise)
        monkeypatch.setattr(demo, "photographs", lambda spoilt=spoilt: spoilt)
        after = DemoTiles(split)
        for index in range(0, len(after), 5):
            assert after[index].tobytes() == before[split][index].tobytes()
        monkeypatch.undo()


def test_a_margin_lies_between_training_and_test() -> None:
    for picture in photographs().values():
        _, last = columns(picture.width, "train")
        first, end = columns(picture.width, "test")
        assert first - last >= 0.03 * picture.width
        assert end == picture.width


def test_tiles_are_the_same_every_time() -> None:
    one, two = DemoTiles("test"), DemoTiles("test")
    assert all(one[index].tobytes() == two[index].tobytes() for index in range(0, len(one), 7))


def test_the_demo_by_name() -> None:
    assert open_source("demo").split == "train"
    assert open_source("demo:train").split == "train"
    assert open_source("demo:test").split == "test"
    with pytest.raises(UserError, match="no split 'val': use demo, demo:train or demo:test"):
        open_source("demo:val")


def test_a_missing_package_or_picture_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PHOTOGRAPHS, "brick", "skimage/data/none.png")
    with pytest.raises(UserError, match=r"skimage lacks data/none.png: install 'dino-ssl\[demo\]'"):
        photographs()
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs skimage: run pip install 'dino-ssl\[demo\]'"):
        photographs()


def test_nothing_is_imported_to_find_the_photographs() -> None:
    loaded = set(sys.modules)
    photographs()
    assert not {"skimage.data", "pooch"} & (set(sys.modules) - loaded)
