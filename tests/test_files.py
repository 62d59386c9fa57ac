"""Files are replaced whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dino.files import UserError, atomic_json, atomic_write, cache_folder, read_json, replacing


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


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="is not a JSON file"):
        read_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/dino"),
        ("linux", {"XDG_CACHE_HOME": "{}/xdg"}, "xdg/dino"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/dino"),  # to be ignored, says XDG
        ("darwin", {"XDG_CACHE_HOME": "{}/xdg"}, "home/Library/Caches/dino"),
        ("win32", {"LOCALAPPDATA": "{}/local"}, "local/dino"),
        ("win32", {}, "home/AppData/Local/dino"),
        ("linux", {"DINO_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(
    platform: str,
    variables: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("DINO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setattr("sys.platform", platform)
    assert cache_folder() == tmp_path / expected
