"""The log of a run: what stays of `metrics.jsonl`, and what the terminal shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dino.runtime import Ranks
from dino.train.run_log import RunLog, read_metrics

ODD = [
    b"[]",
    b"null",
    b"3",
    b'{"loss": 1}',
    b'{"step": "x"}',
    b'{"step": 1.5}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"step": 4, "lo',
]


def test_odd_lines_of_metrics_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [b'{"step": 0, "knn": {"k10": 1.0}}', b'{"step": 2, "loss": 1.0}', b'{"step": 4}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*good, *ODD]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 4]
    with RunLog(tmp_path, Ranks(), total=8, start=2) as log:
        log.write({"step": 3})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 3]
    assert f"left out {len(ODD)} unreadable lines" in capsys.readouterr().err


def test_only_the_main_rank_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, Ranks(rank=1, world=2), total=8) as log:
        log.say("hello")
        log.write({"step": 1, "loss": 1.0})
        log.advance(1)
        log.refused(1, float("nan"), ["a.png"])
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["refused.jsonl"]
    assert json.loads((tmp_path / "refused.jsonl").read_text())["rank"] == 1


def test_names_are_not_read_as_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "set[" / "[out]"
    run.mkdir(parents=True)
    with RunLog(run, Ranks(), total=8) as log:
        log.say(f"starting: {run}")
        log.refused(1, 0.0, [])
    shown = capsys.readouterr().err
    assert f"starting: {run}" in shown
    assert f"listed in {run / 'refused.jsonl'}" in shown
