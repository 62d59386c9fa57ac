"""Features of many images: each once, in order, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fakes import MeanColor
from PIL import Image
from torch import Tensor

from dino.data.sources.open import open_source
from dino.features import extractor
from dino.features import table as tables
from dino.features.extractor import Descriptor, extract
from dino.features.table import FeatureBatch, Subset
from dino.files import UserError
from dino.runtime import Ranks


@pytest.fixture
def images() -> list[tuple[Image.Image, int]]:
    shades = [(7 * i, 255 - 9 * i, 3 * i * i) for i in range(9)]
    return [(Image.new("RGB", (8, 8), shade), i % 3) for i, shade in enumerate(shades)]


def one_by_one(backbone: MeanColor, images: list[tuple[Image.Image, int]]) -> Tensor:
    backbone.eval()
    with torch.no_grad():
        rows = [backbone(backbone.preprocess(image)[None]) for image, _ in images]
    backbone.train()
    return torch.cat(rows)


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (4, 0), (100, 0), (4, 2)])
def test_each_image_once_and_in_order(
    mean_color: MeanColor, images: list[Any], batch: int, workers: int
) -> None:
    table = extract(mean_color, open_source(images), batch=batch, workers=workers)
    torch.testing.assert_close(table.features, one_by_one(mean_color, images))
    assert table.labels is not None
    assert table.labels.tolist() == [label for _, label in images]
    assert len(table.paths) == len(table) == 9
    assert mean_color.training


def test_evaluation_mode_is_left_on(mean_color: MeanColor, images: list[Any]) -> None:
    extract(mean_color.eval(), open_source(images))
    assert not mean_color.training


def test_the_network_is_left_as_it_was_when_an_image_is_broken(
    mean_color: MeanColor, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"none of the 1 images can be used.*broken\.png"):
        extract(mean_color, open_source(tmp_path))
    assert mean_color.training


def test_extraction_does_not_change_the_random_state(
    mean_color: MeanColor, images: list[Any]
) -> None:
    before = torch.get_rng_state()
    extract(mean_color, open_source(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_that_cannot_be_used_have_no_row(
    mean_color: MeanColor, images: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, (image, label) in enumerate(images):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        image.save(tmp_path / str(label) / f"{index}.png")
    good = extract(mean_color, open_source(tmp_path))
    damaged = tmp_path / "1" / "bad.png"
    damaged.write_bytes(b"not a picture")
    for batch in (1, 2):
        table = extract(mean_color, open_source(tmp_path), batch=batch)
        assert torch.equal(table.features, good.features)
        assert torch.equal(table.labels, good.labels)
        assert table.paths == good.paths
        assert [(error.path, error.defect) for error in table.skipped] == [
            (str(damaged), "not an image")
        ]
    warning = " ".join(capsys.readouterr().err.split())
    assert warning.count("1 of 10 images could not be used and were left out (1 not an image)") == 1


@pytest.mark.usefixtures("unchecked")  # the other ranks answer with too little
@pytest.mark.parametrize("world", [2, 4, 12])  # 12: some ranks have no image at all
def test_ranks_share_and_gather(
    mean_color: MeanColor, images: list[Any], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(images)
    shares: list[FeatureBatch] = []
    finished = False

    def gather(item: Any) -> list[Any]:
        if isinstance(item, int):
            return list(range(world))
        if not finished:
            shares.append(item)
        return shares if finished else [FeatureBatch([0], torch.empty(1, 3), {})]

    for module in (tables, extractor):
        monkeypatch.setattr(module, "gather_objects", gather)
    for rank in range(world):
        for module in (tables, extractor):
            monkeypatch.setattr(module, "ranks", lambda rank=rank: Ranks(rank, world, rank))
        extract(mean_color, source, batch=2)
    finished = True
    table = extract(mean_color, source, batch=2)
    assert [index for share in shares for index in share.indices] == list(range(9))
    torch.testing.assert_close(table.features, one_by_one(mean_color, images))


def test_without_a_process_group_one_process_computes_all(
    mean_color: MeanColor, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    table = extract(mean_color, open_source(images))
    torch.testing.assert_close(table.features, one_by_one(mean_color, images))


def test_a_subset_is_a_source(images: list[Any]) -> None:
    part = Subset(open_source(images), [5, 2])
    assert len(part) == 2
    assert part.labels == [2, 2]
    assert part.classes == ["0", "1", "2"]
    assert [part.path(i) for i in (0, 1)] == ["item 5 of the list", "item 2 of the list"]
    sample = part[0]
    assert isinstance(sample, Image.Image)
    assert sample.getpixel((0, 0)) == images[5][0].getpixel((0, 0))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        None,
    ],
)
def test_out_of_memory_names_the_batch(
    mean_color: MeanColor, images: list[Any], error: Exception | None
) -> None:
    def compute(backbone: MeanColor, batch: Tensor) -> Tensor:
        if error is not None:
            raise error
        return torch.empty(2**46)  # 256 TiB: the real error of the CPU's allocator

    huge = Descriptor("huge", mean_color.preprocessing, compute)
    with pytest.raises(UserError, match="set a smaller --batch"):
        extract(mean_color, open_source(images), huge)
    assert mean_color.training


def test_other_errors_are_not_reported_as_lack_of_memory(
    mean_color: MeanColor, images: list[Any]
) -> None:
    def compute(backbone: MeanColor, batch: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        extract(mean_color, open_source(images), Descriptor("x", mean_color.preprocessing, compute))
