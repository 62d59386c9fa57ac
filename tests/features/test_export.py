"""Features as files, and the command that writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.features.export import FeatureSettings, run, save
from dino.features.table import FeatureTable
from dino.files import UserError
from dino.models.create import create
from dino.weights.load import fingerprint
from dino.weights.load import save as save_weights

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


def test_the_command_writes_the_features_of_the_library(
    tmp_path: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8).eval()
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
    printed = capsys.readouterr().out.split()
    assert printed == [str(out), *(str(out.with_suffix(end)) for end in (".csv", ".json"))]
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
