"""Files are replaced whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from dino.files import (
    UserError,
    atomic_csv,
    atomic_json,
    atomic_write,
    cache_folder,
    read_json,
    replacing,
)


def test_an_error_half_way_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    atomic_write(tmp_path / "deep" / "ours", b"x")
    assert (tmp_path / "deep" / "ours").stat().st_mode == plain.stat().st_mode


def test_json_has_no_nan(tmp_path: Path) -> None:
    atomic_json(tmp_path / "a.json", {"a": [1.0, float("nan")], "b": (float("inf"), "x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None], "b": [None, "x"]}
    assert read_json(tmp_path / "a.json")["b"] == [None, "x"]


def test_csv_keeps_every_name(tmp_path: Path) -> None:
    names = ['say "a, b"', "two\nlines", os.fsdecode(b"\xff.jpg")]  # the last is not UTF-8
    atomic_csv(tmp_path / "a.csv", ("path", "rank"), [(name, 1) for name in names])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "rank"], *([name, "1"] for name in names)]


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="is not a JSON file"):
        read_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"DINO_CACHE": "/x/y", "XDG_CACHE_HOME": "/c"}, "/x/y"),
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/dino"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/dino"),
        ("linux", {}, "/home/me/.cache/dino"),
        ("darwin", {"XDG_CACHE_HOME": "/c"}, "/home/me/Library/Caches/dino"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/dino"),
        ("win32", {}, "/home/me/AppData/Local/dino"),
    ],
)
def test_where_caches_lie(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DINO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)
