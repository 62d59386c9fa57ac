"""Folders: what is remembered of them, and that no change goes unnoticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino.data.sources import folder as scan
from dino.data.sources.folder import image_names, visible_files
from dino.files import UserError

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small folders are remembered too, and folders of this second settle at once."""
    monkeypatch.setattr(scan, "KEPT_FROM", 0)
    monkeypatch.setattr(scan, "SETTLING", -(10**12))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed, not remembered, by their names."""
    found: list[str] = []
    true_list = scan._list

    def note(path: Path, *rest: object) -> scan.Listing:
        found.append(path.name)
        return true_list(path, *rest)

    monkeypatch.setattr(scan, "_list", note)
    return found


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "root", "a/1.png", "a/2.png", "b/c/3.png", "b/4.png", "5.png")


NAMES = ["5.png", "a/1.png", "a/2.png", "b/4.png", "b/c/3.png"]


def test_a_second_start_lists_nothing(root: Path, listed: list[str]) -> None:
    assert image_names(root) == NAMES
    assert sorted(listed) == ["a", "b", "c", "root"]
    listed.clear()
    assert image_names(root) == NAMES
    assert listed == []


CHANGES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "a new file": (lambda r: make(r, "b/9.png"), [*NAMES, "b/9.png"], ["b"]),
    "a file removed": (lambda r: (r / "a/1.png").unlink(), NAMES[:1] + NAMES[2:], ["a"]),
    "a file renamed": (
        lambda r: (r / "a/1.png").rename(r / "a/0.png"),
        ["a/0.png", *NAMES[:1], *NAMES[2:]],
        ["a"],
    ),
    "a file moved": (
        lambda r: (r / "5.png").rename(r / "b/c/5.png"),
        [*NAMES[1:], "b/c/5.png"],
        ["c", "root"],
    ),
    "a new folder": (lambda r: make(r, "b/d/7.png"), [*NAMES, "b/d/7.png"], ["b", "d"]),
    "a folder removed": (lambda r: shutil.rmtree(r / "b/c"), NAMES[:-1], ["b"]),
    "a folder renamed": (
        lambda r: (r / "b/c").rename(r / "b/d"),
        [*NAMES[:-1], "b/d/3.png"],
        ["b", "d"],
    ),
    "a folder replaced": (
        lambda r: (
            (r / "b/c").rename(r.parent / "gone"),
            make(r, "b/c/8.png"),
            os.utime(r / "b/c", (LONG_AGO, LONG_AGO)),
        ),
        [*NAMES[:-1], "b/c/8.png"],
        ["b", "c"],
    ),
    "a file in place of a folder": (
        lambda r: (shutil.rmtree(r / "b/c"), make(r, "b/c.png")),
        [*NAMES[:-1], "b/c.png"],
        ["b"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(root: Path, listed: list[str], what: str) -> None:
    change, names, again = CHANGES[what]
    image_names(root)
    listed.clear()
    change(root)
    assert image_names(root) == sorted(names)
    assert sorted(listed) == again
    listed.clear()
    assert image_names(root) == sorted(names)
    assert listed == []


def test_a_changed_time_does_not_hide_a_change(root: Path) -> None:
    """As programs that copy folders with their times do."""
    os.utime(root / "a", (LONG_AGO, LONG_AGO))
    image_names(root)
    make(root, "a/3.png")
    os.utime(root / "a", (LONG_AGO, LONG_AGO))
    assert "a/3.png" in image_names(root)


def test_what_changed_a_moment_ago_is_not_trusted(
    root: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SETTLING", 10**12)
    image_names(root)
    listed.clear()
    assert image_names(root) == NAMES
    assert sorted(listed) == ["a", "b", "c", "root"]


def test_a_change_within_a_tick_of_the_clock_is_noticed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SETTLING", 10**12)
    monkeypatch.setattr(scan, "_state", lambda status: (status.st_dev, status.st_ino, 0, 0))
    image_names(root)
    make(root, "a/3.png")
    assert "a/3.png" in image_names(root)


# ---------------------------------------------------------------------------------- links
def test_links_to_folders_and_files_that_change_their_targets(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "a/1.png")
    old = make(tmp_path / "old", "2.png", "3.png")
    new = make(tmp_path / "new", "4.png")
    (root / "link").symlink_to(old)
    (root / "file.png").symlink_to(old / "2.png")
    assert image_names(root) == ["a/1.png", "file.png", "link/2.png", "link/3.png"]
    make(old, "5.png")
    assert "link/5.png" in image_names(root)
    old.rename(tmp_path / "gone")  # the links themselves stay as they were
    new.rename(old)
    assert image_names(root) == ["a/1.png", "file.png", "link/4.png"]
    shutil.rmtree(old)
    old.touch()
    (root / "pictures.png").symlink_to(tmp_path / "gone")
    assert image_names(root) == [
        *("a/1.png", "file.png", "pictures.png/2.png", "pictures.png/3.png", "pictures.png/5.png")
    ]


def test_of_two_ways_to_a_folder_the_shorter_is_taken_then_the_first(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "z/1.png", "a/deep/0.png")
    (root / "a" / "deep" / "z").symlink_to(root / "z")
    (root / "y").symlink_to(root / "z")
    for _ in range(2):
        assert image_names(root) == ["a/deep/0.png", "y/1.png"]


def test_a_root_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make(tmp_path / "one", "1.png"))
    assert image_names(tmp_path / "link") == ["1.png"]
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(make(tmp_path / "two", "2.png"))
    assert image_names(tmp_path / "link") == ["2.png"]


# ---------------------------------------------------------------------------------- the cache
@pytest.mark.parametrize("damage", [b"", b"no", None])
def test_a_damaged_cache_is_made_anew(root: Path, cache: Path, damage: bytes | None) -> None:
    image_names(root)
    [file] = (cache / "folders").iterdir()
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert image_names(root) == NAMES
    assert image_names(root) == NAMES


def test_a_cache_of_something_else_is_made_anew(root: Path, cache: Path) -> None:
    image_names(root)
    image_names(make(root.parent / "other", "x.png"))
    files = sorted((cache / "folders").iterdir())
    assert len(files) == 2
    text, numbers = np.zeros(3), np.zeros(2)
    for wrong in (
        {"text": text, "ends": numbers},
        {"text": text, "ends": numbers, "states": numbers},
        {"text": text, "ends": np.zeros((3, 4), int), "states": np.zeros((2, 4), np.uint64)},
        {"text": text, "ends": np.zeros((2, 3), int), "states": np.zeros((2, 4), np.uint64)},
    ):
        scan.keep("folders", scan._key(root), wrong)
        assert image_names(root) == NAMES


def test_without_a_cache_folder_it_works_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert image_names(root) == NAMES


def test_small_folders_are_not_kept(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "KEPT_FROM", 10)
    image_names(root)
    assert not (cache / "folders").exists()


def test_nothing_is_written_twice(root: Path, cache: Path) -> None:
    image_names(root)
    [file] = (cache / "folders").iterdir()
    before = file.stat()
    image_names(root)
    assert file.stat() == before


SCANS = """
import sys
from pathlib import Path
from dino.data.sources import folder as scan
scan.KEPT_FROM, scan.SETTLING = 0, -(10**12)
root, mine = Path(sys.argv[1]), Path(sys.argv[1], "a", sys.argv[2])
for _ in range(30):
    names = scan.image_names(root)
    mine.touch()
    mine.unlink()
print(*names)
"""


def test_processes_that_scan_at_once_agree(root: Path) -> None:
    """Nobody reads what another has half written."""
    words = [sys.executable, "-c", SCANS, str(root)]
    started = [
        subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True) for name in ("x", "y")
    ]
    for process in started:
        told, _ = process.communicate(timeout=300)
        assert told.split() == NAMES


names = st.text("aé.\n\x01", min_size=1, max_size=3).filter(lambda name: name.strip(".") != "")


@given(st.dictionaries(names, st.lists(names, max_size=3), max_size=4))
def test_names_survive_being_kept(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, list[str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folder, files in tree.items():
        make(root, *(f"{folder}/{name}" for name in files))
    for name in (os.fsdecode(b"\xff\xfe.png"), "x" * 200):
        make(root, name)
    first = visible_files(root)
    known = scan._recall(root)
    assert sorted(visible_files(root)) == sorted(first)
    assert sorted(first) == sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    assert known.keys() == {"", *(folder for folder, files in tree.items() if files)} - {
        folder for folder in tree if folder.startswith(".")
    }


def test_a_folder_of_shards_says_how_to_name_them(tmp_path: Path) -> None:
    make(tmp_path, "a-000.tar", "a-001.tar")
    with pytest.raises(
        UserError, match=r"holds 2 \.tar: give --data '.*/NAME-\{000\.\.NNN\}\.tar'"
    ):
        image_names(tmp_path)
