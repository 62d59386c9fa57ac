"""`dino ablate`: a table of three rows is trained, resumed and compared with the paper."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino import ablation, cli
from dino.ablation import AblationSettings, rank_correlation
from dino.files import UserError
from dino.show.report.ablation import Point, curves, scatter
from dino.train import ablations
from dino.train.ablations import Network, Row, Table
from dino.train.loop import Result
from dino.train.planning.budget import Candidate

SIZES = {
    **{"model.embed_dim": 24, "model.depth": 1, "model.heads": 2, "model.patch_size": 8},
    **{"views.global_size": 16, "views.local_size": 8, "views.local_count": 1},
    **{"head.prototypes": 8, "head.hidden": 16, "head.bottleneck": 8, "run.batch": 4},
}
TINY = Table(
    "Table 0: <teachers>",
    "knn",
    (
        Row("momentum", {}, 72.8),
        Row("student copy", {"teacher.kind": "student_copy"}, 0.1),
        Row("plain <targets>", {"teacher.targets": "none"}, 30.0),
    ),
    "A note.",
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(8):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network of milliseconds, whose speed is known."""
    monkeypatch.setattr(ablation, "NETWORKS", (Network(SIZES, 0),))
    for tables in (ablation.TABLES, ablations.TABLES):
        monkeypatch.setitem(tables, "table0", TINY)
    monkeypatch.setattr(ablation, "RUN_SECONDS", 0.0)
    monkeypatch.setattr(ablation, "timed_network", lambda config, *_: Candidate(config, speed=50.0))


def settings(data: Path, out: Path, **changes: Any) -> AblationSettings:
    values = AblationSettings(data=str(data), out=out, budget="12s", seeds=2, device="cpu")
    return replace(values, **{"workers": 0, **changes})


def test_a_table_is_trained_resumed_and_compared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, train, calls = tmp_path / "out", ablation.train, []

    def counted(*arguments: Any, **options: Any) -> Result:
        calls.append(arguments[2].parent.name)
        result = train(*arguments, **options)
        return replace(result, step=0) if len(calls) == 2 else result  # as a signal ends it

    monkeypatch.setattr(ablation, "train", counted)
    assert not ablation.run("table0", settings(data, out))
    assert calls == ["momentum", "student_copy"]
    assert [row["name"] for row in results(out)["rows"]] == ["momentum"]
    assert ablation.run("table0", settings(data, out))
    assert len(calls) == 2 + 6
    content = results(out)
    assert [row["name"] for row in content["rows"]] == [row.name for row in TINY.rows]
    # 12 s for 6 runs at 50 images/s, less what the planning took.
    assert 90 <= content["images"] <= 100
    steps = {
        json.loads(line)["step"]
        for run in out.glob("*/seed-*/metrics.jsonl")
        for line in run.read_text().splitlines()[-1:]
    }
    assert steps == {content["images"] // 4}
    for row in content["rows"]:
        assert len(row["seeds"]) == 2
        assert row["knn"] == pytest.approx(np.mean([seed["knn"] for seed in row["seeds"]]))
    assert [row["collapses_in_paper"] for row in content["rows"]] == [False, True, False]
    page = (out / "page.html").read_text()
    assert "plain &lt;targets&gt;" in page
    assert "<targets>" not in page
    assert (out / "chart.svg").read_text() in page
    printed = capsys.readouterr()
    assert "run 6 of 6: plain <targets>, seed 1" in printed.err
    assert str(out / "page.html") in printed.out
    with pytest.raises(UserError, match=r"holds an ablation with seeds 2, not 3"):
        ablation.run("table0", settings(data, out, seeds=3))


def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def test_what_cannot_be_compared_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 rows with 5 seeds take at least .* --budget or fewer"):
        ablation.run("table0", settings(data, tmp_path / "out", seeds=5, budget="10s"))
    with pytest.raises(UserError, match="needs classes"):
        ablation.run("table0", settings(data / "a", tmp_path / "out"))
    with pytest.raises(UserError, match="have no 'table3'"):
        ablation.run("table3", settings(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("measures", "collapse"),
    [
        ({"teacher_entropy": math.log(8), "kl": 1e-4}, "uniform"),
        ({"teacher_entropy": 1e-4, "kl": 1e-5}, "one prototype"),
        ({"teacher_entropy": 1.0, "kl": 0.1}, ""),
        ({"target_spread": 1e-4}, "constant"),
        ({"target_spread": 0.5, "kl": None}, ""),
    ],
)
def test_a_collapse_at_the_end_is_named(
    tmp_path: Path, measures: dict[str, float], collapse: str
) -> None:
    lines = [{"step": 1, "loss": 1.0, "kl": 5.0}] + [
        {"step": step, "loss": 1.0, **measures} for step in range(2, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = ablation._outcome(tmp_path, 8, {"k10": 1.0, "k20": 42.0})
    assert (outcome.knn, outcome.collapse) == (42.0, collapse)


@given(st.permutations(range(7)))
def test_the_rank_correlation_of_distinct_values(order: list[int]) -> None:
    expected = 1 - 6 * sum((i - j) ** 2 for i, j in enumerate(order)) / (7 * 48)
    found = rank_correlation([(i**2, math.exp(j)) for i, j in enumerate(order)])
    assert found == pytest.approx(expected)


def test_no_rank_correlation_of_few_or_equal_values() -> None:
    assert math.isnan(rank_correlation([(1, 2), (3, 4)]))
    assert math.isnan(rank_correlation([(1, 2), (3, 2), (4, 2)]))


def test_drawings_show_every_row() -> None:
    drawing = scatter([Point("a & b", 70, 50, 2.0, False), Point("c", 0.1, 12, None, True)])
    assert drawing.count("<circle") == 1
    assert drawing.count('class="cross"') == 2
    assert drawing.count('class="error"') == 1
    assert "a &amp; b" in drawing
    lines = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3, "kl": 0.1}]
    drawn = curves({"x": lines, "y": lines, "none": [{"step": 1}]}, {"kl": "KL", "no": "no"})
    assert drawn.count("<polyline") == 2


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ablate"])
    assert ended.value.code == 2
    assert "'dino ablate list' names them" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["ablate", "table7", "--help"])
    assert ended.value.code == 0
    assert "table15" in capsys.readouterr().out
    cli.main(["ablate", "list"])
    printed = capsys.readouterr().out
    assert "Table 7: components" in printed
    assert "smallest network" in printed
