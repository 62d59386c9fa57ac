"""`sessions.json`: one entry for each process, whatever was there before."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from dino.train.sessions import Session


def test_each_process_has_an_entry_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    first = Session(tmp_path, {"command": "one"})
    assert not path.exists()
    for step in (5, 10):
        first.save(step)
    second = Session(tmp_path, {"command": "two"})
    for step in (15, 20):
        second.save(step)
    entries = json.loads(path.read_text())
    assert [(entry["command"], entry["step"]) for entry in entries] == [("one", 10), ("two", 20)]
    for entry in entries:
        started, saved = (datetime.fromisoformat(entry[key]) for key in ("started", "saved"))
        assert started.tzinfo is not None
        assert saved >= started
        assert 0 <= entry["seconds"] < 60


@pytest.mark.parametrize("content", ["{", "{}", "7"])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "sessions.json").write_text(content)
    Session(tmp_path, {}).save(3)
    (entry,) = json.loads((tmp_path / "sessions.json").read_text())
    assert entry["step"] == 3
