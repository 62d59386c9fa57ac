"""Sinks: what they get, how a resumed run goes on there, and that none of them stops a run.

Weights & Biases and MLflow are stand-ins with the calls of the real libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dino.files import UserError
from dino.runtime import Ranks
from dino.train.run_log import RunLog, read_metrics

LINES = ({"step": 2, "lr": 1.5, "refused": 0}, {"step": 2, "knn": {"k20": 60.0}})


class FakeWandB:
    """`wandb`: runs by their id."""

    def __init__(self) -> None:
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.metrics: set[str] = set()
        self.finished = 0

    def init(self, id: str | None, resume: str, **options: Any) -> Any:
        assert resume == "allow"
        self.options = options
        log = self.runs.setdefault(name := id or f"run{len(self.runs)}", [])

        def finish() -> None:
            self.finished += 1

        metric = lambda name, **_: self.metrics.add(name)  # noqa: E731
        return SimpleNamespace(id=name, log=log.append, finish=finish, define_metric=metric)


class FakeMLflow:
    """`mlflow`, and its `tracking.MlflowClient`."""

    def __init__(self) -> None:
        self.tracking = SimpleNamespace(MlflowClient=lambda: self)
        self.runs: dict[str, list[tuple[str, float, int]]] = {}
        self.params: dict[str, Any] = {}
        self.status: list[str] = []

    def set_experiment(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name)

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment == "dino"
        self.runs[run_name] = []
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_param(self, run: str, name: str, value: Any) -> None:
        self.params[name] = value

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.runs[run].append((name, value, step))

    def update_run(self, run: str, status: str) -> None:
        self.status.append(status)

    def set_terminated(self, run: str) -> None:
        self.status.append("FINISHED")


def log(run: Path, *sinks: str) -> None:
    settings = {"optim.lr": 0.1}
    with RunLog(run, Ranks(), total=8, start=0, sinks=sinks, settings=settings) as found:
        for line in LINES:
            found.write(line)


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for times in (1, 2):  # the second process goes on in the same run
        log(tmp_path, "wandb")
        one = [{"lr": 1.5, "refused": 0, "step": 2}, {"knn/k20": 60.0, "step": 2}]
        assert fake.runs == {"run0": one * times}
        assert fake.finished == times
    assert fake.options["name"] == tmp_path.name
    assert fake.options["config"] == {"optim.lr": 0.1}
    assert fake.metrics == {"step", "*"}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    for times in (1, 2):
        log(tmp_path, "mlflow")
        one = [("lr", 1.5, 2), ("refused", 0, 2), ("knn/k20", 60.0, 2)]
        assert fake.runs == {tmp_path.name: one * times}
        assert fake.status == ["RUNNING", "FINISHED"] * times
    assert fake.params == {"optim.lr": 0.1}


def test_both_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())  # type: ignore[arg-type]
    log(tmp_path, "wandb", "mlflow")
    known = json.loads((tmp_path / "sinks.json").read_text())
    assert known == {"wandb": "run0", "mlflow": tmp_path.name}


def test_a_sink_that_fails_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]

    def fail(*_: Any) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr("dino.train.sinks.WandB.write", fail)
    log(tmp_path, "wandb")
    shown = capsys.readouterr().err
    assert shown.count("wandb failed and gets nothing more") == 1
    assert "the network is down" in shown
    assert len(read_metrics(tmp_path)) == 2


def test_one_that_cannot_be_opened_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed .*pip install dino-ssl\[wandb\]"):
        log(tmp_path, "wandb")
    fake = FakeWandB()
    fake.init = lambda **_: 1 / 0  # type: ignore[method-assign, assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"wandb cannot be used \(ZeroDivisionError.*--execution"):
        log(tmp_path, "wandb")
