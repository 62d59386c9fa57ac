"""Folders: which images they hold, what is left out, and the splits they may be divided into."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers.dicoms import dicom
from hypothesis import given
from hypothesis import strategies as st

from dino.data.sources import folder as scan
from dino.data.sources.folder import Folder, _visible_files, image_names, splits
from dino.data.sources.open import open_source
from dino.files import UserError


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


def test_images_sorted_by_their_path(root: Path) -> None:
    assert image_names(root) == (NAMES, {})
    make(root, "b/9.png")
    assert image_names(root)[0] == sorted([*NAMES, "b/9.png"])


# ---------------------------------------------------------------------------------- links
def test_links_to_folders_and_files(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "a/1.png")
    other = make(tmp_path / "other", "2.png", "3.png")
    (root / "link").symlink_to(other)
    (root / "file.png").symlink_to(other / "2.png")
    names = ["a/1.png", "file.png", "link/2.png", "link/3.png"]
    assert image_names(root)[0] == names
    (root / "link").unlink()
    (root / "link").symlink_to(tmp_path / "gone")
    assert image_names(root)[0] == names[:2]


def test_of_two_ways_to_a_folder_the_shorter_is_taken_then_the_first(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "z/1.png", "a/deep/0.png")
    (root / "a" / "deep" / "z").symlink_to(root / "z")
    (root / "y").symlink_to(root / "z")
    assert image_names(root)[0] == ["a/deep/0.png", "y/1.png"]


def test_circular_and_broken_links_are_files_that_are_missing(root: Path) -> None:
    (root / "up").symlink_to(root)
    (root / "one.png").symlink_to(root / "two.png")
    (root / "two.png").symlink_to(root / "one.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    assert image_names(root)[0] == sorted([*NAMES, "one.png", "two.png", "gone.png"])


def test_a_root_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make(tmp_path / "one", "1.png"))
    assert image_names(tmp_path / "link")[0] == ["1.png"]


# ---------------------------------------------------------------------------------- left out
def test_other_files_are_counted_by_their_ending(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root, "a/x.TXT", "a/y.txt", "b/z.xcf", "[red]", ".hidden", ".git/config.txt")
    source = open_source(root)
    assert source.left_out == {".txt": 2, ".xcf": 1, "": 1}
    assert len(source) == len(NAMES)
    assert capsys.readouterr().err == (
        f"{root}: 4 files are left out, being no images: 2 .txt, 1 .xcf, 1 without extension\n"
    )
    assert open_source(root / "a" / "..").left_out == source.left_out
    capsys.readouterr()
    assert open_source(make(root.parent / "c", "1.png", "2.png")).left_out == {}
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_sockets_and_devices_are_no_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to("/dev/zero")
    monkeypatch.chdir(root)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
        assert image_names(root) == (NAMES, {"special": 3})


# ---------------------------------------------------------------------------------- errors
def test_a_folder_that_cannot_be_read_or_vanishes_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = os.scandir

    def refuse(path: Path) -> object:
        if str(path).endswith("c"):
            raise error
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for error in (PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such folder")):
        with pytest.raises(UserError, match=rf"the folder .*b/c cannot be read \({error.strerror}"):
            open_source(root)


def test_a_folder_of_tables_or_shards_says_how_to_name_them(tmp_path: Path) -> None:
    make(tmp_path / "a", "a-000.tar", "a-001.tar")
    with pytest.raises(UserError, match=r"holds 2 \.tar: give --data '.*/NAME-\{000\.\.NNN\}"):
        image_names(tmp_path / "a")
    make(tmp_path / "b", "a.parquet")
    with pytest.raises(UserError, match=r"holds 1 \.parquet: give --data one of them, or hf:"):
        image_names(tmp_path / "b")


# ---------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("inside", ["", "images/"])
@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["train", "val"], ["train", "val"]),
        (["Train", "VALID", "test"], ["train", "val", "test"]),
        (["train", "validation", "val", ".cache"], ["train", "val"]),
        (["dev", "train"], ["train", "val"]),
        (["train", "unlabelled"], ["train"]),
        (["cat", "dog", "test"], ["test"]),
    ],
)
def test_splits_are_no_classes(
    tmp_path: Path, inside: str, folders: list[str], found: list[str]
) -> None:
    root = make(tmp_path, *(f"{inside}{folder}/{i}.png" for folder in folders for i in range(2)))
    make(root, ".git/train/1.png")
    by_split = splits(root)
    assert list(by_split) == found
    for split, folder in by_split.items():
        assert folder.parent == root / inside
        assert folder.name.lower() in scan.SPLITS[split]
    if "val" in folders:
        assert by_split["val"].name == "val"
    with pytest.raises(UserError, match=r"is divided into splits, which are no classes: give one"):
        open_source(root)
    first = by_split[found[0]]
    assert len(open_source(first)) == 2


def test_folders_of_classes_have_no_splits(root: Path) -> None:
    assert splits(root) == {}
    assert splits(root / "nowhere") == {}
    assert splits(make(root / "deep", "train.png", "d/x/train/1.png", "d/y/1.png")) == {}
    assert splits(make(root / "mixed", "1.png", "images/train/1.png")) == {}
    (root / "deep" / "d" / "up").symlink_to(root / "deep")
    assert splits(root / "deep") == {}


# ---------------------------------------------------------------------------------- names, digest
names = st.text("aé.\n\x01", min_size=1, max_size=3).filter(lambda name: name.strip(".") != "")


@given(st.dictionaries(names, st.lists(names, max_size=3), max_size=4))
def test_files_of_any_name_are_found(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, list[str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folder, files in tree.items():
        make(root, *(f"{folder}/{name}" for name in files))
    for name in (os.fsdecode(b"\xff\xfe.png"), "x" * 200):
        make(root, name)
    assert sorted(_visible_files(root)[0]) == sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def test_the_digest_is_that_of_names_and_classes(root: Path, tmp_path: Path) -> None:
    digest = Folder(root).digest()
    assert len(digest) == 64
    moved = root.rename(tmp_path / "elsewhere")
    assert Folder(moved).digest() == digest
    (moved / "5.png").rename(moved / "6.png")
    other = Folder(moved).digest()
    assert other != digest
    make(moved, "7.png")
    assert Folder(moved).digest() not in (digest, other)


# ---------------------------------------------------------------------------------- DICOM
def test_dicom_files_need_no_ending(tmp_path: Path) -> None:
    for name in ("IM0001", "1.2.840.17", "a.dcm"):
        dicom(tmp_path / name, np.zeros((4, 4), np.uint16))
    (tmp_path / "README").write_text("no image")
    (tmp_path / "b.17").write_bytes(b"")
    source = open_source(tmp_path)
    assert [Path(source.path(i)).name for i in range(3)] == ["1.2.840.17", "IM0001", "a.dcm"]
    assert source.left_out == {"": 1, ".17": 1}
