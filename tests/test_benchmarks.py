"""Benchmarks that need hours or a GPU: with `--tiny` they run on a CPU, and they are resumable."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.packing import pictures

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labelled images to train on and to measure on."""
    pictures(tmp_path / "data" / "train", 14)
    pictures(tmp_path / "data" / "val", 7)
    return tmp_path / "data"


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / script, "--device", "cpu", "--tiny", *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_exactness_passes_and_fails_above_a_bar(tmp_path: Path) -> None:
    out = tmp_path / "exactness.jsonl"
    done = run("gpu/exactness.py", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(out)
    assert len(rows) == 10
    differences = [line for row in rows for line in row["differences"]]
    assert 0 < max(line["difference"] for line in differences) < 1e-4  # sums in another order

    differences[0]["difference"] = 2 * differences[0]["bar"]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    done = run("gpu/exactness.py", "--out", out, "--minutes", 0)
    assert done.returncode == 1
    assert done.stdout.count("ABOVE") == 1
    assert "the same command continues" in done.stdout  # the tenth check
    assert len(rows_of(out)) == 9


def test_speed_measures_each_case_once(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "speed.jsonl"
    assert run("gpu/speed.py", "--data", data / "train", "--out", out).returncode == 0
    peak, *cases = rows_of(out)
    assert peak["flops"] > 0
    assert [row["case"]["who"] for row in cases] == ["ours", "plain"]
    for row in cases:
        assert row["images_per_s"] > 0
        assert row["flop_per_image"] > 1e6
        assert 0 <= row["data_wait"] < 1
        assert row["peak_bytes"] > 2**20

    out.write_text("".join(json.dumps(row) + "\n" for row in (peak, cases[0])) + '{"measure": "ca')
    done = run("gpu/speed.py", "--data", data / "train", "--out", out, "--minutes", 0)
    assert done.returncode == 3
    assert rows_of(out) == [peak, cases[0]]


def test_training_continues_to_its_end(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    words = ["gpu/train.py", "--data", data, "--out", out, "--total", 0.02]
    first = run(*words, "--minutes", 0)
    assert first.returncode == 3, first.stderr
    plan = rows_of(out / "plan.jsonl")
    assert not (out / "attention.png").exists()
    second = run(*words, "--minutes", 5)
    assert second.returncode == 0, second.stderr
    assert rows_of(out / "plan.jsonl") == plan
    steps = f"{plan[0]['steps']:,}"
    assert f"\n│ {steps} " in second.stdout
    assert (out / "run" / "attention.png").exists()
    assert (out / "run" / "report.html").exists()


def test_quality_per_hour(tmp_path: Path, data: Path) -> None:
    who = ["ours"]
    if importlib.util.find_spec("lightly") is not None:
        who.append("lightly")
    words = ["--data", data, "--out", tmp_path, "--minutes", 0.01, "--points", 2, "--workers", 0]
    done = run("quality_per_hour.py", *words, "--threads", 1, "--who", *who)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    found = {name: [row for row in rows if row["who"] == name] for name in ("untrained", "ours")}
    assert len(found["untrained"]) == 1
    assert len(found["ours"]) == 2
    minutes = [row["minutes"] for row in found["ours"]]
    assert 0 < minutes[0] < minutes[1]
    assert all(0 <= row["knn"] <= 100 for row in found["ours"])
    assert "raw pixels" in (tmp_path / "table.txt").read_text()
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "quality.png").exists() == drawn
    again = run("quality_per_hour.py", *words, "--threads", 1, "--who", *who)
    assert again.returncode == 0
    assert rows_of(tmp_path / "rows.jsonl") == rows
