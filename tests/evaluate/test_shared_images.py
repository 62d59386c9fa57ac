"""Equal files within a set of images and between two."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino.data import equal_files as module
from dino.data.equal_files import TAIL, equal_files
from dino.evaluate.shared_images import shared_images


def write(folder: Path, contents: dict[str, bytes]) -> list[str]:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def test_files_with_the_same_bytes_are_grouped(tmp_path: Path) -> None:
    end = b"same end" * TAIL  # files that differ before it only
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"1" + end, "e": b"2" + end}
    paths = write(tmp_path / "x", {**contents, "f": b"one", "g": b"1" + end})
    assert equal_files([*paths, "item 3 of the list", str(tmp_path)]) == [[0, 2, 5], [3, 6]]


def test_test_images_among_the_training_images(tmp_path: Path) -> None:
    train = write(tmp_path / "train", {"a": b"one", "b": b"one", "c": b"two", "d": b"three"})
    test = write(tmp_path / "test", {"x": b"three", "y": b"four", "z": b"one", "zz": b"four"})
    found = shared_images(train, test)
    assert found is not None
    assert (found.count, found.images, found.leave_one_out) == (2, 4, False)
    assert sorted(found.examples) == [(test[0], train[3]), (test[2], train[0])]
    assert "2 of 4 test images are also training images" in found.sentence()
    clean = shared_images(train, test[1:2])
    assert clean is not None
    assert (clean.count, clean.sentence()) == (0, "")


def test_copies_within_a_bank(tmp_path: Path) -> None:
    bank = write(tmp_path / "bank", {"a": b"one", "b": b"two", "c": b"one"})
    found = shared_images(bank, None)
    assert found is not None
    assert (found.count, found.images) == (2, 3)
    assert found.examples == [(bank[0], bank[2]), (bank[2], bank[0])]
    assert "2 of 3 test images have a copy in the bank" in found.sentence()


def test_images_that_are_no_files_are_not_compared(tmp_path: Path) -> None:
    files = write(tmp_path / "bank", {"a": b"one"})
    assert shared_images(["item 1"], files) is None
    assert shared_images(files, ["item 1"]) is None
    assert shared_images(["item 1"], None) is None


def test_only_files_that_may_be_shared_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def digest(path: str) -> bytes:
        read.append(Path(path).name)
        return Path(path).read_bytes()

    monkeypatch.setattr(module, "_digest", digest)
    train = write(tmp_path / "train", {"a": b"one", "b": b"one", "c": b"five!"})
    shared_images(train, write(tmp_path / "test", {"x": b"two", "y": b"five!"}))
    assert read == ["c", "y"]
