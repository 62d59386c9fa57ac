"""The command line: help, one table, one sentence for each mistake."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from helpers.results import result
from PIL import Image

import dino
from dino import cli, pretraining
from dino.files import UserError
from dino.models.create import create
from dino.settings import Range
from dino.train.recipes import RECIPES
from dino.weights.load import save

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
    "model.embed_dim": 24,
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


def run(words: str, *more: str | Path) -> None:
    """Run the command; `words` are split at blanks."""
    cli.main([*words.split(), *map(str, more)])


def status(words: str, *more: str | Path) -> Any:
    """The exit status of a command that exits."""
    with pytest.raises(SystemExit) as caught:
        run(words, *more)
    return caught.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command ends, with status 2."""
    assert status("", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dino: ")
    return line


def every(commands: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, cli.Command]]:
    for name, command in commands.items():
        if isinstance(command, cli.Group):
            yield from every(command.commands, f"{prefix}{name} ")
        else:
            yield prefix + name, command


@pytest.mark.parametrize(("name", "command"), list(every(cli.COMMANDS)))
def test_every_command_exists_and_explains_its_settings(
    name: str, command: cli.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *names = command.target.split(":")
    assert all(callable(getattr(import_module(f"dino.{module}"), part)) for part in names)
    assert status(f"{name} --help") == 0
    assert f"dino {name}" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["main(['--help'])", "main(['pretrain', 'vit_b8', '--help'])"])
def test_help_needs_no_network_library(code: str) -> None:
    code = f"try: {code}\nfinally: print('torch' in sys.modules)"
    code = f"import sys; from dino.cli import main\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("False\n")
    for name in RECIPES if "vit_b8" in code else cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("words", ["--help", "evaluate --help", "data --help", "--version"])
def test_words_about_the_program(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(words)
    out = capsys.readouterr().out
    assert dino.__version__ in out or "knn" in out or "preview" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train", "'dino train': did you mean 'dino pretrain'?"),
        ("knn", "'dino knn': did you mean 'dino evaluate knn'?"),
        ("evaluate lineer", "did you mean 'dino evaluate linear'?"),
        ("evaluate map", "'dino evaluate map': known are knn, linear"),
        ("wieghts list", "did you mean 'dino weights'?"),
        ("pretrain smal_data --out x", "unknown recipe 'smal_data': did you mean small_data?"),
        ("pretrain xyz --out x", "unknown recipe 'xyz': known are vit_s16"),
    ],
)
def test_similar_names_are_suggested(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, *words.split())


def test_former_options_are_refused_and_the_new_one_named() -> None:
    @dataclass
    class Settings:
        renamed: ClassVar[dict[str, str]] = {"old_name": "new_name", "--gone": "--here"}
        new_name: int = 1

    assert cli.parse(Settings, "dino x", ["--new-name", "3"]) == Settings(3)
    for word in ("--old-name", "--old_name=3"):
        with pytest.raises(UserError, match="dino x: --old-name is called --new-name now"):
            cli.parse(Settings, "dino x", [word, "3"])
    with pytest.raises(UserError, match="--gone is called --here now"):
        cli.parse(Settings, "dino x", ["--gone"])


@dataclass(frozen=True)
class Limited:
    """A command."""

    share: Annotated[float, Range(low=0, high=1)] = 0.5


def test_settings_of_every_command_are_validated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dino.show.report.report.ReportSettings", Limited)
    sentence = "share is 1.5: it must be a number from 0 to 1"
    assert sentence in refused(capsys, "report", "--share", "1.5")
    assert "share is nan" in refused(capsys, "report", "--share", "nan")
    assert "temperature is (nan,)" in refused(
        capsys, *["evaluate", "knn", "--weights", "w", "--data", "d", "--temperature", "nan"]
    )


def test_names_that_are_not_utf_8_are_printed() -> None:
    name = os.fsdecode(b"pipe\xff")
    code = (
        "import dino.show.report.report as r; from dino.cli import main\n"
        f"r.run = lambda settings: print(settings.weights == ({name!a},), *settings.weights)\n"
        f"main(['report', {name!a}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        timeout=300,
    )
    assert done.stdout == b"True pipe\\udcff\n"


def test_an_interruption_ends_in_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dino.show.report.report.run", interrupted)
    assert status("report x") == 130
    assert capsys.readouterr() == ("", "")
    stopped = SimpleNamespace(finished=False, run=tmp_path, refused=0)
    monkeypatch.setattr("dino.pretraining.pretrain", lambda *_, **__: stopped)
    assert status("pretrain demo --out x") == 130


@pytest.mark.parametrize("words", ["--help", "pretrain --help", "weights list --all"])
def test_a_reader_that_stops_reading_is_no_mistake(words: str) -> None:
    command = [sys.executable, "-m", "dino", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, error = process.communicate(timeout=120)
    assert error == b""
    assert process.returncode in (1, 141)  # 1 comes from rich


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_named() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dino", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the output cannot be used (No space left on device)" in line


def test_mistakes_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    texts, empty, few = tmp_path / "texts", tmp_path / "empty", folder(tmp_path / "few", 3)
    texts.mkdir(), empty.mkdir()
    for name in ("a.txt", "b.txt", "c.csv"):
        (texts / name).write_text("x")

    def pretrain(*words: str) -> str:
        return refused(capsys, "pretrain", *words, "--out", out)

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
    assert "unknown device 'tpu9'" in pretrain("demo", "--device", "tpu9")
    assert not (tmp_path / "run").exists()


def test_wrong_flags_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("pretrain demo --out x --optim.lrr 3") == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_from_images_to_numbers_and_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folder(tmp_path / "images"), tmp_path / "run"
    words = "pretrain small_data --device cpu --model.arch vit_tiny --execution.precision fp32"
    run(words, "--optim.freeze-last-layer", "0 steps", *FLAGS, "--data", data, "--out", out)
    printed = capsys.readouterr().out
    assert "raw pixels" in printed
    assert "report.html" in printed
    results = json.loads((out / "results.json").read_text())["knn"]
    assert results.keys() == {
        *("trained", "untrained", "pixels", "k", "bank", "queries", "skipped", "leave_one_out")
    }
    assert (out / "report.html").stat().st_size > 10_000

    run("evaluate knn --k 1 3 --workers 0", "--weights", out, "--data", data)
    assert "k = 3" in capsys.readouterr().out
    assert result(out, "knn")["leave_one_out"] is True

    table = tmp_path / "f.npy"
    run("features --workers 0", "--weights", out, "--data", data, "--out", table)
    assert np.load(table).shape == (12, 24)

    (out / "report.html").unlink()
    run("report", out)
    assert (out / "report.html").exists()


def test_a_folder_of_splits_trains_on_train_and_measures_on_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data" / "train"), folder(tmp_path / "data" / "valid", 6)
    folder(tmp_path / "data" / "test"), folder(tmp_path / "data" / ".hidden")
    run("pretrain demo", "--data", tmp_path / "data", "--out", tmp_path / "run", *FLAGS)
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
    assert backbone.spec["embed_dim"] == 24
    assert not (tmp_path / "run" / "results.json").exists()  # no labels, no k-NN
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dino.load(None), "weights must be a path, not None"),
        (lambda: dino.load(["a", "b"]), "weights must be a path"),
        (lambda: dino.load("nowhere"), "there are no weights at nowhere"),
        (lambda: dino.load("w", network="techer"), "there are no weights at w"),
        (lambda: dino.load("w", position="foo"), "position is 'foo': it must be"),
        (lambda: dino.load("w", channels="3"), "channels is '3': it must be"),
        (lambda: dino.load("w", heads=0), "heads is 0: it must be"),
        (lambda: dino.create(5), "arch must be a name such as vit_small, not 5"),
        (lambda: dino.pretrain(out=None), "out must be a path, not None"),
        (lambda: dino.pretrain("demo", out="run", stats=3), "stats must be a path, not 3"),
        (lambda: dino.pretrain("demo", out="run", init_from=3), "init_from must be a path, not 3"),
        (lambda: dino.pretrain("demo", out="run", device=3.5), "unknown device 3.5"),
        (lambda: dino.pretrain("demo", out="run", data=5), "cannot take images from a int"),
    ],
)
def test_wrong_arguments_in_python_end_in_one_sentence(
    call: Callable[[], Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        call()
    assert list(tmp_path.iterdir()) == []


def test_weights_on_a_wrong_device(tmp_path: Path) -> None:
    save(dino.create("vit_tiny", patch_size=8, image_size=16, depth=1), tmp_path / "w")
    for device in ("cpux", 3.5):
        with pytest.raises(UserError, match=f"cannot be moved to device {device!r}"):
            dino.load(tmp_path / "w", device)


def test_the_public_functions_are_the_real_ones() -> None:
    assert {"create", "load", "pretrain"} <= {*dir(dino)}
    assert dino.create is create
    assert dino.pretrain is pretraining.pretrain
    assert list(inspect.signature(dino.load).parameters)[:2] == ["weights", "device"]
    assert "run folder" in (dino.load.__doc__ or "")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dino.lode  # noqa: B018
