"""The command as a user meets it: help, one table, one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dino
from dino import cli
from dino.train.recipes import RECIPES

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")


def folder(path: Path, count: int = 12, classes: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for index in range(count):
        kind = path / f"class{index % classes}" if classes else path
        kind.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(kind / f"{index:02}.png")
    return path


TINY: dict[str, Any] = {
    "model.width": 24,
    "model.depth": 1,
    "model.heads": 2,
    "model.patch_size": 8,
    "head.prototypes": 16,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "views.global_size": 16,
    "views.local_size": 8,
    "views.local_count": 1,
    "run.batch": 4,
    "run.duration": "2 steps",
    "optim.warmup": "1 steps",
    "execution.workers": 0,
}
FLAGS = [w for k, v in TINY.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command ends, with status 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dino: ")
    return line


def test_help_needs_no_network_library() -> None:
    code = (
        "import sys; from dino.cli import main; main(['--help'])\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    for command in cli.COMMANDS:
        assert command in out
    assert out.endswith("False False\n")


def test_help_of_a_recipe_needs_no_torch() -> None:
    code = (
        "import sys; from dino.cli import main\n"
        "try: main(['pretrain', 'vit_b8', '--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert out.endswith("False\n")
    assert "--optim.lr" in out
    for recipe in RECIPES:
        assert recipe in out


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"], ["--version"]])
def test_words_about_the_program(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    out = capsys.readouterr().out
    assert dino.__version__ in out or "knn" in out


def test_mistakes_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    texts, empty, few = tmp_path / "texts", tmp_path / "empty", folder(tmp_path / "few", 3)
    texts.mkdir(), empty.mkdir()
    for name in ("a.txt", "b.txt", "c.csv"):
        (texts / name).write_text("x")

    def pretrain(*words: str) -> str:
        return refused(capsys, "pretrain", *words, "--out", out)

    assert "unknown recipe 'vits': known are vit_s16" in pretrain("vits")
    assert str(tmp_path / "nowhere") in pretrain("demo", "--data", str(tmp_path / "nowhere"))
    assert "empty" in pretrain("demo", "--data", str(empty))
    line = pretrain("demo", "--data", str(texts))
    assert "2 .txt" in line
    assert "1 .csv" in line
    assert "3 images, fewer than one batch of 4" in pretrain("demo", "--data", str(few), *FLAGS)
    assert "take 224 or 240" in pretrain("vit_s16", "--views.global-size", "225")
    assert "optim.warmup" in pretrain(
        "demo", *FLAGS, "--optim.warmup", "9 steps", "--data", str(folder(tmp_path / "ok"))
    )
    assert "no command 'train'" in refused(capsys, "train")
    assert "no command 'map'" in refused(capsys, "evaluate", "map")
    assert "unknown device 'tpu9'" in pretrain("demo", "--device", "tpu9")
    assert not (tmp_path / "run").exists()


def test_wrong_flags_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "demo", "--out", "x", "--optim.lrr", "3"])
    assert caught.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_from_images_to_numbers_and_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = folder(tmp_path / "images"), tmp_path / "run"
    cli.main(
        [
            "pretrain",
            "small_data",
            "--data",
            str(data),
            "--out",
            str(run),
            *FLAGS,
            "--device",
            "cpu",
            "--model.arch",
            "vit_tiny",
            "--execution.precision",
            "fp32",
            "--optim.freeze-last-layer",
            "0 steps",
        ]
    )
    out = capsys.readouterr().out
    assert "raw pixels" in out
    assert "report.html" in out
    results = json.loads((run / "results.json").read_text())["knn"]
    assert set(results) == {
        "trained",
        "untrained",
        "pixels",
        "k",
        "bank",
        "queries",
        "skipped",
        "leave_one_out",
    }
    assert (run / "report.html").stat().st_size > 10_000

    cli.main(
        [
            "evaluate",
            "knn",
            "--weights",
            str(run),
            "--data",
            str(data),
            "--k",
            "1",
            "3",
            "--workers",
            "0",
        ]
    )
    assert "k = 3" in capsys.readouterr().out
    found = json.loads((run / "knn.json").read_text())
    assert found["leave_one_out"] is True

    cli.main(
        [
            "features",
            "--weights",
            str(run),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "f.npy"),
            "--workers",
            "0",
        ]
    )
    assert np.load(tmp_path / "f.npy").shape == (12, 24)

    (run / "report.html").unlink()
    cli.main(["report", "--run", str(run)])
    assert (run / "report.html").exists()


def test_a_folder_of_splits_trains_on_train_and_measures_on_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data" / "train"), folder(tmp_path / "data" / "valid", 6)
    folder(tmp_path / "data" / "test"), folder(tmp_path / "data" / ".hidden")
    cli.main(
        [
            "pretrain",
            "demo",
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "run"),
            *FLAGS,
        ]
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["defining"]["data.images"] == 12
    assert config["about"]["val"].endswith("valid")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn"]["queries"] == 6
    assert "data is divided into splits: images to learn from are" in capsys.readouterr().err


def test_splits_without_classes_are_trained_on_and_not_measured(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        folder(tmp_path / "data" / split, classes=0)
    arguments = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    cli.main(["pretrain", "demo", *arguments, *FLAGS])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["defining"]["data.images"] == 12
    assert config["about"]["val"] is None
    assert not (tmp_path / "run" / "results.json").exists()


def test_python_does_what_the_command_does(tmp_path: Path) -> None:
    images = np.stack([np.full((20, 20, 3), 9 * i, np.uint8) for i in range(8)])
    result = dino.pretrain("demo", data=images, out=tmp_path / "run", device="cpu", settings=TINY)
    assert result.finished
    backbone = dino.load(tmp_path / "run")
    assert backbone.spec["width"] == 24
    assert not (tmp_path / "run" / "results.json").exists()  # no labels, no k-NN
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("job", ["check", "stats", "preview"])
def test_jobs_for_data_explain_themselves(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "--help"])
    assert job in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", job, "--help"])
    assert caught.value.code == 0
    assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["evaluate", "knn"], ["features"], ["report"]])
def test_every_job_explains_its_settings(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--help"])
    assert caught.value.code == 0
    assert "--device" in capsys.readouterr().out
