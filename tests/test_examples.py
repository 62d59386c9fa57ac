"""The examples run, with small networks."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers.packing import pictures
from helpers.small import TINY_RUN

from dino.data.sources.open import open_source
from dino.data.sources.shards import Shards

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {**TINY_RUN, "run.duration": "4 steps", "execution.knn_every": "2 steps"}


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words, "--set", json.dumps(SMALL)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == {
        *("own_dataset.py", "shards.py")
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
