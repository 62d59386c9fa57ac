"""`dino.pretrain`: what follows the training cannot fail it, and is shared among the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import run as run_ranks
from helpers.small import TINY_RUN
from PIL import Image

import dino
from dino import pretraining
from dino.features import extractor
from dino.files import UserError
from dino.runtime import Ranks
from dino.train.config import PretrainConfig
from dino.train.run_folder import read_config

SETTINGS = {**TINY_RUN, "run.duration": "1 steps", "execution.knn_every": "0 steps"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of two classes."""
    generator = np.random.default_rng(0)
    for index in range(10):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


def pretrain(data: Path, out: Path, **settings: Any) -> Any:
    return dino.pretrain(
        "demo", data=data, out=out, device="cpu", settings={**SETTINGS, **settings}
    )


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes seconds and is tested elsewhere."""
    monkeypatch.setattr(pretraining, "report", lambda *_, **__: None)


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("no [font] /found")


def test_a_comparison_or_report_that_fails_is_a_warning(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretraining, "compare", fails)
    monkeypatch.setattr(pretraining, "report", fails)
    assert pretrain(photos, tmp_path / "run").finished
    printed = capsys.readouterr().err
    assert "the comparison with the untrained network failed (RuntimeError: no [font] /f" in printed
    assert "the report failed (RuntimeError: no [font] /found); the weights are saved" in printed
    assert {"teacher.safetensors"} == {p.name for p in (tmp_path / "run").glob("*.safetensors")}


def test_the_page_is_written_at_each_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    written = []

    def noted(folder: Path, **options: Any) -> Path:
        path = page(folder, **options)
        step = json.loads((run / "sessions.json").read_text())[-1]["step"]
        written.append((step, options.get("images"), "refresh" in path.read_text()[:500]))
        return path

    page = pretraining.report
    monkeypatch.setattr(pretraining, "report", noted)
    monkeypatch.setattr(pretraining, "monotonic", lambda: 0.0)  # no time passes
    pretrain(photos, run, **{"run.duration": "4 steps", "execution.checkpoint_every": "2 steps"})
    assert written == [(2, False, True), (4, False, True), (4, True, False)]
    text = (run / "report.html").read_text()
    assert "dino.pretrain(recipe=&#x27;demo&#x27;, data=&#x27;" in text
    assert "head.prototypes = 16 (recipe: 512)" in text


def test_the_page_takes_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [0.0], []

    def slow(*_: Any, **__: Any) -> None:
        written.append(now[0])
        now[0] += 3.0

    monkeypatch.setattr(pretraining, "report", slow)
    monkeypatch.setattr(pretraining, "monotonic", lambda: now[0])
    page = pretraining._Page(tmp_path, {})
    for step in range(60):
        now[0] = max(now[0], 10.0 * step)
        page.after_checkpoint(step)
    assert written == [0.0, 300.0]


def test_a_page_that_fails_while_training_is_one_warning(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dino.train.sessions.atomic_json", fails)
    monkeypatch.setattr(pretraining, "report", lambda *_, **__: None)
    settings = {"run.duration": "4 steps", "execution.checkpoint_every": "1 steps"}
    assert pretrain(photos, tmp_path / "run", **settings).finished
    assert capsys.readouterr().err.count("the report failed (RuntimeError") == 1


@pytest.mark.usefixtures("no_report")
def test_results_that_cannot_be_read_are_measured_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pretrain(photos, tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    before = results.read_text()
    for content in ("[]", "{", '{"checkpoint": "step_00000001", "knn": {"k": 1}}'):
        results.write_text(content)
        pretraining.print_result(result)
        assert "k-NN" not in capsys.readouterr().out
        pretrain(photos, tmp_path / "run")
        assert results.read_text() == before
    pretraining.print_result(result)
    assert "raw pixels" in capsys.readouterr().out


@pytest.mark.usefixtures("no_report")
def test_the_result_gives_network_curves_and_page(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"run.duration": "2 steps", "execution.knn_every": "1 steps"}
    changes |= {"execution.log_every": "1 steps", "optim.weight-decay": 0.05}
    result = pretrain(photos, out, **changes)
    assert read_config(out / "config.json")["defining"]["optim.weight_decay"] == 0.05
    backbone = result.backbone()
    assert repr(backbone) == f"<dino vit_tiny/8: {out}, teacher, step 2>"
    rows = result.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(isinstance(row["loss"], float) for row in rows)
    measured = {f"knn/{name}": value for name, value in result.measured.items()}
    assert measured
    assert measured.items() <= rows[-1].items()
    assert result.report == out / "report.html"
    assert (result.run, result.step) == (out, 2)


@pytest.mark.usefixtures("no_report")
def test_the_comparison_uses_the_workers(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    loader = extractor.evaluation_loader

    def noted(source: Any, preprocess: Any, batch: int, workers: int) -> Any:
        used.append(workers)
        return loader(source, preprocess, batch, 0)

    monkeypatch.setattr(extractor, "evaluation_loader", noted)
    pretrain(photos, tmp_path / "run", **{"execution.workers": 1})
    assert used == [1, 1, 1]  # trained, untrained, pixels


def ranked(ranks: Ranks, data: Path, out: Path) -> int:
    """How many images this rank embedded for the comparison."""
    counts = []
    loader = extractor.evaluation_loader

    def noted(source: Any, *arguments: Any) -> Any:
        counts.append(len(source))
        return loader(source, *arguments)

    extractor.evaluation_loader = noted  # type: ignore[attr-defined]
    pretraining.report = lambda *_, **__: out  # type: ignore[attr-defined]
    pretrain(data, out)
    return sum(counts)


@pytest.mark.usefixtures("no_report")
def test_ranks_share_the_comparison(photos: Path, tmp_path: Path) -> None:
    pretrain(photos, tmp_path / "one")
    assert run_ranks(ranked, 2, photos, tmp_path / "two", joined=False) == [15, 15]
    one, two = (
        json.loads((tmp_path / run / "results.json").read_text())["knn"] for run in ("one", "two")
    )
    assert two == one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"recipe": 5}, r"recipe is 5: it must be text or None"),
        ({"recipe": "vits"}, r"unknown recipe"),
        ({"settings": [1]}, r"settings is \[1\]"),
        ({"settings": {"optim.lr": float("nan")}}, r"optim.lr is nan"),
        ({"recipe": PretrainConfig().changed({"run.batch": 8.0})}, r"run.batch is 8.0"),
        ({"init_head": "none"}, r"init_head is 'none': it must be 'auto' or 'new'"),
        ({"device": "tpu0"}, r"device"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(
    tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        dino.pretrain(**{"data": tmp_path / "none", "out": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()
