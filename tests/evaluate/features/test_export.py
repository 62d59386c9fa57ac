"""Features of many images: each once, in order, whoever computes them; and their files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fakes import MeanColor
from PIL import Image
from torch import Tensor

from dino.data.images.readers import IMAGENET_MEAN, IMAGENET_STD
from dino.data.sources.open import open_source
from dino.evaluate.features import table as tables
from dino.evaluate.features.export import FeatureSettings, extract, pixels, run, save
from dino.evaluate.features.table import FeatureTable, Part
from dino.files import UserError
from dino.models.create import create
from dino.runtime import Ranks
from dino.weights.load import fingerprint
from dino.weights.load import save as save_weights


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


def test_no_random_number_is_taken_from_the_training(
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
    for _ in range(2):
        table = extract(mean_color, open_source(tmp_path), batch=2)
        assert torch.equal(table.features, good.features)
        assert torch.equal(table.labels, good.labels)
        assert table.paths == good.paths
        assert [(error.path, error.defect) for error in table.skipped] == [
            (str(damaged), "not an image")
        ]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("1 of 10 images could not be used and were left out (1 not an image)") == 1


@pytest.mark.usefixtures("unchecked")  # the other ranks answer with too little
@pytest.mark.parametrize("world", [2, 4, 12])  # 12: some ranks have no image at all
def test_ranks_share_and_gather(
    mean_color: MeanColor, images: list[Any], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(images)
    shares: list[tuple[Tensor | None, list[int], list[Any]]] = []
    finished = False

    def gather(item: Any) -> list[Any]:
        if isinstance(item, int):
            return list(range(world))
        if not finished:
            shares.append(item)
        return shares if finished else [(torch.empty(0, 3), [], {})]

    monkeypatch.setattr(tables, "gather_objects", gather)
    for rank in range(world):
        monkeypatch.setattr(tables, "ranks", lambda rank=rank: Ranks(rank, world, rank))
        extract(mean_color, source, batch=2)
    finished = True
    table = extract(mean_color, source, batch=2)
    assert [index for _, kept, _ in shares for index in kept] == list(range(9))
    torch.testing.assert_close(table.features, one_by_one(mean_color, images))


def test_a_launcher_without_a_process_group_shares_nothing(
    mean_color: MeanColor, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in (*launcher.items(), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    table = extract(mean_color, open_source(images))
    torch.testing.assert_close(table.features, one_by_one(mean_color, images))


def test_part_is_a_source(images: list[Any]) -> None:
    part = Part(open_source(images), [5, 2])
    assert len(part) == 2
    assert part.labels == [2, 2]
    assert part.classes == ["0", "1", "2"]
    assert [part.path(i) for i in (0, 1)] == ["item 5 of the list", "item 2 of the list"]
    sample = part[0]
    assert isinstance(sample, Image.Image)
    assert sample.getpixel((0, 0)) == images[5][0].getpixel((0, 0))


def normalized(values: Tensor) -> Tensor:
    """Values [3, S, S] from 0 to 1 as networks get them, flattened."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((values - mean[:, None, None]) / std[:, None, None]).flatten()


def test_pixels_are_the_squeezed_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    flat = np.full((10, 30, 3), 51, dtype=np.uint8)
    table = pixels(open_source([Image.fromarray(noise), Image.fromarray(flat)]), size=4)
    assert table.labels is None
    expected = normalized(torch.from_numpy(noise).permute(2, 0, 1) / 255)
    torch.testing.assert_close(table.features[0], expected)
    torch.testing.assert_close(table.features[1], normalized(torch.full((3, 4, 4), 0.2)))


def test_pixels_of_tensors() -> None:
    white = torch.full((3, 6, 9), 255, dtype=torch.uint8)
    found = pixels(open_source([white]), size=2).features[0]
    torch.testing.assert_close(found, normalized(torch.ones(3, 2, 2)))


TABLE = FeatureTable(
    torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    torch.tensor([1, 0, 1]),
    ["a/1.png", 'with, comma and "quotes".png', "ümläut.png"],
    ["cats", "dogs"],
)


def test_npy_and_csv_come_back(tmp_path: Path) -> None:
    files = save(TABLE, tmp_path / "new" / "f.npy")
    assert [path.name for path in files] == ["f.npy", "f.csv"]
    loaded = np.load(files[0], allow_pickle=False)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, TABLE.features.numpy())
    with files[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == TABLE.paths
    assert [(row["label"], row["class"]) for row in rows] == [
        ("1", "dogs"),
        ("0", "cats"),
        ("1", "dogs"),
    ]


def test_parquet_comes_back(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = save(TABLE, tmp_path / "f.parquet")
    table = parquet.read_table(path)
    assert table["path"].to_pylist() == TABLE.paths
    assert table["label"].to_pylist() == [1, 0, 1]
    assert table["class"].to_pylist() == ["dogs", "cats", "dogs"]
    found = np.array(table["feature"].to_pylist(), dtype=np.float32)
    assert np.array_equal(found, TABLE.features.numpy())


def test_unlabelled_images_have_empty_columns(tmp_path: Path) -> None:
    table = FeatureTable(TABLE.features, None, ["1", "2", "3"], None)
    _, listing = save(table, tmp_path / "f.npy")
    assert listing.read_text() == "path,label,class\n1,,\n2,,\n3,,\n"
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = save(table, tmp_path / "f.parquet")
    assert parquet.read_table(path)["label"].to_pylist() == [None] * 3


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"F\.npy or F\.parquet"):
        save(TABLE, tmp_path / "f.txt")
    settings = FeatureSettings(weights="nowhere", data="nowhere", out=tmp_path / "f.h5")
    with pytest.raises(UserError, match=r"f\.h5"):  # before anything is looked for
        run(settings)


def test_command_writes_what_the_library_gives(
    tmp_path: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vit = create("vit_tiny", width=12, depth=1, heads=2, patch_size=4, image_size=8).eval()
    save_weights(vit, tmp_path / "vit.safetensors")
    folder, out = color_folder("photos", 2), tmp_path / "out" / "f.npy"
    settings = FeatureSettings(
        weights=str(tmp_path / "vit.safetensors"),
        data=str(folder),
        out=out,
        workers=0,
        device="cpu",
    )
    table = run(settings)
    assert capsys.readouterr().out.strip() == str(out)
    assert np.array_equal(np.load(out), table.features.numpy())
    np.testing.assert_allclose(vit.embed(table.paths), table.features.numpy(), rtol=1e-5, atol=1e-6)
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["images"] == 6
    assert about["width"] == 12
    assert about["classes"] == ["blue", "green", "red"]
    assert about["weights"]["sha256"] == fingerprint(vit)
    assert about["weights"]["dialect"] == "dino"
    assert len(about["weights"]["file_sha256"]) == 64
    assert about["preprocessing"] == json.loads(json.dumps(vit.preprocessing.to_dict()))
    assert about["settings"]["data"] == str(folder)
    assert about["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
