"""The index of a folder: brought up to date image by image, replaced at once, never of others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fakes import MeanColor
from PIL import Image
from torch import Tensor

from dino.data.sources.open import open_source
from dino.features import index as indexes
from dino.features.extractor import extract
from dino.features.index import Index, open_index, read_index
from dino.files import UserError, read_json


class Counting(MeanColor):
    """Counts the images whose feature it computes."""

    images = 0

    def forward(self, images: Tensor, keep: None = None) -> Tensor:
        self.images += len(images)
        return super().forward(images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        picture(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def opened(images: Any, index: Path | None = None, **options: Any) -> tuple[Index, int]:
    """The index, and how many features were computed for it."""
    network = Counting().eval()
    return open_index(network, images, index, **options), network.images


def assert_current(index: Index, folder: Path) -> None:
    """It holds exactly what a new computation gives."""
    table = extract(MeanColor(), open_source(folder))
    assert list(index.paths) == table.paths
    assert torch.equal(index.features, F.normalize(table.features, dim=1))
    assert [str(error) for error in index.skipped] == [str(error) for error in table.skipped]


def add(folder: Path) -> None:
    picture(folder / "25.png", 25)  # in the middle of the order


def change(folder: Path) -> None:
    picture(folder / "3.png", 33)


def touch(folder: Path) -> None:
    os.utime(folder / "3.png", ns=(1, 1))


def remove(folder: Path) -> None:
    (folder / "0.png").unlink()


def rename(folder: Path) -> None:
    (folder / "5.png").rename(folder / "1b.png")


def spoil(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"no picture")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "computed"),
    [(nothing, 0), (add, 1), (change, 1), (touch, 1), (remove, 0), (rename, 1), (spoil, 0)],
)
def test_an_update_computes_only_what_is_new(
    edit: Callable[[Path], None], computed: int, folder: Path, tmp_path: Path
) -> None:
    (folder / "bad.png").write_bytes(b"no picture either")
    first, count = opened(folder, tmp_path / "index", store=tmp_path / "a")
    assert count == 6
    assert_current(first, folder)
    edit(folder)
    second, count = opened(folder, tmp_path / "index", store=tmp_path / "b")
    assert count == computed
    assert_current(second, folder)
    assert_current(read_index(tmp_path / "index"), folder)
    names = [path.name.partition("-")[0] for path in sorted((tmp_path / "index").iterdir())]
    assert names == ["features", "images", "index.json"]
    assert (first.about["id"] == second.about["id"]) == (edit is nothing)


def test_an_opened_index_outlives_its_update(folder: Path, tmp_path: Path) -> None:
    first, _ = opened(folder, tmp_path / "index")
    before = first.features.clone()
    change(folder)
    opened(folder, tmp_path / "index")
    assert torch.equal(first.features, before)


def test_an_interrupted_update_leaves_the_old_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = opened(folder, tmp_path / "index")
    change(folder)
    for step in ("atomic_csv", "atomic_json"):
        with monkeypatch.context() as patch:
            patch.setattr(indexes, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                opened(folder, tmp_path / "index")
        there = read_index(tmp_path / "index")
        assert there.about == first.about
        assert torch.equal(there.features, first.features)
    monkeypatch.setattr(indexes, "STRAY_SECONDS", 0)
    assert_current(opened(folder, tmp_path / "index")[0], folder)
    assert len(list((tmp_path / "index").iterdir())) == 3


def test_the_default_place_is_of_the_weights_and_the_folder(folder: Path, tmp_path: Path) -> None:
    index, _ = opened(folder)
    again, count = opened(str(folder), store=tmp_path / "store")
    assert (again.folder, count) == (index.folder, 0)
    other = MeanColor()
    torch.nn.init.constant_(other.scale, 2.0)
    assert open_index(other, folder).folder != index.folder
    assert opened(folder, precision="bf16")[0].folder != index.folder


def test_other_weights_and_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    opened(folder, tmp_path / "index")
    other = MeanColor()
    torch.nn.init.constant_(other.scale, 2.0)
    with pytest.raises(UserError, match="other weights"):
        open_index(other, folder, tmp_path / "index")
    with pytest.raises(UserError, match="other weights"):
        read_index(tmp_path / "index", other)
    with pytest.raises(UserError, match="other settings"):
        opened(folder, tmp_path / "index", precision="bf16")
    read_index(tmp_path / "index", MeanColor())


def test_what_is_no_index_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index"):
        read_index(tmp_path)
    with pytest.raises(UserError, match="folder of images"):
        opened([Image.new("RGB", (8, 8))], tmp_path / "index")
    index, _ = opened(folder, tmp_path / "index")
    np.save(index.folder / f"features-{index.about['id']}.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match="damaged"):
        read_index(index.folder)
    (index.folder / f"features-{index.about['id']}.npy").unlink()
    with pytest.raises(UserError, match="lacks files"):
        read_index(index.folder)


def test_unusable_images_are_retried_when_they_change(folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    index, count = opened(folder, tmp_path / "index")
    assert count == 5
    assert [error.defect for error in index.skipped] == ["not an image"]
    picture(folder / "2.png", 2)
    index, count = opened(folder, tmp_path / "index")
    assert (count, index.skipped) == (1, [])
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 6 images"):
        opened(folder, tmp_path / "index")


def test_a_network_that_has_diverged_is_refused(folder: Path, tmp_path: Path) -> None:
    network = MeanColor()
    torch.nn.init.constant_(network.scale, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        open_index(network, folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_names_of_files_survive(folder: Path, tmp_path: Path) -> None:
    for name in ("=1+1.png", 'a,"b".png', "new\nline.png", "\udcff.png"):
        picture(folder / name, 7)
        (folder / f"bad {name}").write_bytes(b"x")
    index, _ = opened(folder, tmp_path / "index")
    assert_current(index, folder)
    assert opened(folder, tmp_path / "index", store=tmp_path / "b")[1] == 0


def test_the_search_agrees_with_the_features(folder: Path, tmp_path: Path) -> None:
    index, _ = opened(folder, tmp_path / "index")
    table = extract(MeanColor(), open_source(folder))
    exact = F.normalize(table.features.double(), dim=1)
    for k in (3, 99):
        cosines, rows = index.nearest(table.features[:2], k, skip=0)
        scores = exact[:2] @ exact.T
        scores[[0, 1], [0, 1]] = -torch.inf
        expected = scores.sort(dim=1, descending=True)
        assert torch.equal(rows, expected.indices[:, : min(k, 5)])
        assert (cosines - expected.values[:, : min(k, 5)]).abs().max() < 1e-6
    assert read_json(index.folder / "index.json")["weights"]["architecture"] == MeanColor.spec
