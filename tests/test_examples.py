"""The examples run, with small networks."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.packing import pictures
from helpers.small import TINY_RUN

import dino
from dino.data.sources.open import open_source
from dino.data.sources.shards import Shards
from dino.weights.load import save

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {**TINY_RUN, "run.duration": "4 steps", "execution.knn_every": "2 steps"}


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words, "--set", json.dumps(SMALL)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == {
        *("features.py", "own_dataset.py", "shards.py")
    }


def test_a_custom_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(monkeypatch, "own_dataset.py", "--out", str(out), "--images", "24")
    printed = capsys.readouterr().out
    assert "4 steps, k-NN {" in printed
    assert "the feature of an image: 24 numbers" in printed
    assert (out / "teacher.safetensors").exists()
    assert json.loads((out / "results.json").read_text())["knn"]["bank"] == 24


def test_writing_shards_and_training_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("webdataset")
    root, packed, out = pictures(tmp_path / "images", 40), tmp_path / "shards", tmp_path / "run"
    words = ["--images", str(root), "--shards", str(packed), "--out", str(out), "--recipe", "demo"]
    run(monkeypatch, "shards.py", *words, "--per-shard", "2")
    name = f"{packed}/train-{{00000..00019}}.tar"
    printed = capsys.readouterr().out
    assert f"--data '{name}'" in printed
    assert "4 steps, k-NN {" in printed
    source, folder = open_source(name), open_source(root)
    assert isinstance(source, Shards)
    assert (len(source), source.classes) == (40, folder.classes)
    assert sorted(source.labels or []) == folder.labels
    config = json.loads((out / "config.json").read_text())
    assert config["about"]["data"] == name
    assert config["defining"]["data.images"] == 40


class IndexFlatIP:
    """FAISS's exact index of inner products, by numpy; like FAISS it takes float32 only."""

    def __init__(self, length: int) -> None:
        self.rows = np.empty((0, length), np.float32)

    def add(self, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32
        self.rows = np.concatenate([self.rows, rows])

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        similarity = queries @ self.rows.T
        order = np.argsort(-similarity, axis=1)[:, :count]
        return np.take_along_axis(similarity, order, axis=1), order


@pytest.mark.parametrize("faiss", [None, SimpleNamespace(IndexFlatIP=IndexFlatIP)])
def test_using_features(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faiss: Any,
) -> None:
    root, weights = pictures(tmp_path / "images", 15), tmp_path / "w.safetensors"
    shutil.copy(root / "cat" / "000.png", root / "emu" / "copy.png")
    tiny = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 24}
    save(dino.create("vit_tiny", **tiny), weights)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    words = ["features.py", "--weights", str(weights), "--images", str(root), "--similar", "1"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "features.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"<dino vit_tiny/8: {weights}, teacher>" in printed
    assert "% of 16 images" in printed
    assert f"{root}/cat/000.png is similar to {root}/emu/copy.png" in printed
    assert "attention maps [2, 2, 3, 3]" in printed
