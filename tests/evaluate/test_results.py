"""Names of results, what they may replace, and all results of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dino.evaluate.results import collected, data_name, default_path, located, numbered


def test_results_lie_in_the_run_or_beside_the_weights(tmp_path: Path) -> None:
    file, step = tmp_path / "w.safetensors", tmp_path / "checkpoints" / "step_00000008"
    step.mkdir(parents=True)
    for path in (file, step / "state.json"):
        path.touch()
    results = tmp_path / "results"
    assert default_path(str(tmp_path), "knn-a") == results / "knn-a.json"
    assert default_path(str(step), "knn-a") == results / "knn-a-step_00000008.json"
    assert default_path(str(file), "knn-a") == tmp_path / "w.safetensors.knn-a.json"
    assert default_path("dino_vits16", "knn-a") == Path("dino_vits16.knn-a.json")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("photos.v1/", "photos.v1"),
        ("photos.v1/train", "photos.v1"),
        ("photos.v1/Validation", "photos.v1"),
        ("photos.v1/red", "red"),
        ("lists/plankton.csv?path=file&label=species", "plankton"),
        ("/data/train-{000..127}.tar", "train-_000..127"),
        ("hf:org/flowers", "flowers"),
        ("demo:test", "demo_test"),
    ],
)
def test_a_data_set_has_the_name_of_its_folder_or_file(
    data: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("train", "Validation", "red"):
        (tmp_path / "photos.v1" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_name(data) == name
    assert data_name(located(data)) == name


def test_the_folder_where_one_is_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert located(".") == str(tmp_path / "photos")
    (tmp_path / "photos" / "a.csv").touch()
    assert located("a.csv?label=x") == f"{tmp_path / 'photos' / 'a.csv'}?label=x"
    assert located("demo") == "demo"


def test_only_results_of_the_same_images_are_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "knn-photos.json", tmp_path / "knn-photos-2.json"
    assert numbered(first, ["/a/photos"]) == first
    first.write_text(json.dumps({"sources": ["/a/photos"]}))
    assert numbered(first, ["/a/photos"]) == first
    assert numbered(first, ["/b/photos"]) == second
    second.write_text("damaged")
    third = numbered(first, ["/b/photos"])
    assert third == tmp_path / "knn-photos-3.json"
    third.write_text(json.dumps({"sources": ["/b/photos"]}))
    assert numbered(first, ["/b/photos"]) == third


def test_all_results_of_a_run_are_collected(tmp_path: Path) -> None:
    assert collected(tmp_path) == []
    contents = {
        "results/knn-b.json": {"evaluation": "knn", "written": "2026-02-01T00:00:00+00:00"},
        "results/linear-a.json": {"evaluation": "linear", "written": "2026-01-01T00:00:00+00:00"},
        "best.safetensors.knn-b.json": {"evaluation": "knn", "written": "2026-03-01"},
        "results/notes.json": {"mine": 1},
        "results/list.json": [1],
        "results/video-davis/trained.json": {"evaluation": "?"},
        "config.json": {"evaluation": "?"},
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "results" / "knn-c.json").write_text("{")
    damaged, *found = collected(tmp_path)
    assert damaged["path"] == str(tmp_path / "results" / "knn-c.json")
    assert "is not a JSON file" in damaged["problem"]
    names = ("results/linear-a.json", "results/knn-b.json", "best.safetensors.knn-b.json")
    assert found == [{**contents[name], "path": str(tmp_path / name)} for name in names]
