"""Images and videos named on a command line, and the names of their outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.named_inputs import named_inputs
from dino.files import UserError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            path.write_bytes(b"")
        else:
            Image.new("RGB", (4, 3)).save(path)


def names(*words: str) -> list[str]:
    return [one.name for one in named_inputs(words, RGB)]


def test_images_of_folders_are_named_by_their_path_in_it() -> None:
    write("photos/b.png", "photos/cats/a.png", "photos/cats/c d.x.png")
    assert names("photos") == names("photos/") == ["b", "cats/a", "cats/c d.x"]
    assert [one.path for one in named_inputs(["photos"], RGB)][1] == "photos/cats/a.png"


def test_files_patterns_and_videos_are_named_by_their_file() -> None:
    write("photos/b.png", "photos/a.png", "photos/c.jpg", "deep/er/d.png", "film/v.MP4".lower())
    assert names("photos/*.png", "deep/er/d.png", "film/v.mp4") == ["a", "b", "d", "v"]
    assert names("**/*.png") == ["d", "a", "b"]
    found = named_inputs(["film/v.mp4", "photos/a.png"], RGB)
    assert [one.source is None for one in found] == [True, False]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file() -> None:
    write("a[1].png", "a1.png")
    assert names("a[1].png") == ["a_1_"]


def test_equal_names_begin_at_the_folder_that_all_share() -> None:
    write("x/a.png", "y/a.png", "y/b.png")
    assert names("x/a.png", "y/a.png", "y/b.png") == ["x/a", "y/a", "b"]
    assert names("x", "y") == ["x/a", "y/a", "b"]


def test_names_that_differ_by_their_ending_keep_it() -> None:
    write("p/a.png", "p/a.jpg", "p/B.png", "q/b.png", "p/v.mp4", "p/v.png")
    assert names("p/*.png", "p/a.jpg") == ["B", "a.png", "v", "a.jpg"]
    assert names("p/v.mp4", "p/v.png") == ["v.mp4", "v.png"]
    assert names("p/B.png", "q/b.png") == ["p/B", "q/b"]  # some disks have no upper case


def test_nothing_is_shown_twice() -> None:
    write("p/a.png")
    with pytest.raises(UserError, match=r"p/a\.png is named twice"):
        named_inputs(["p", "p/a.png"], RGB)


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_files_that_do_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist: check the name"):
        named_inputs([name], RGB)


def test_patterns_without_files_and_folders_without_images() -> None:
    with pytest.raises(UserError, match=r"no/\* does not exist: give --data a folder of images"):
        named_inputs(["no/*"], RGB)
    write("films/v.mp4")
    with pytest.raises(UserError, match=r"films holds no images: found 1 \.mp4"):
        named_inputs(["films"], RGB)


def test_arrays_have_names_too_and_pixels_their_format(tmp_path: Path) -> None:
    np.save("many.npy", np.zeros((2, 5, 6, 4), np.uint8))
    found = named_inputs(["many.npy"], PixelFormat(4))
    assert [one.name for one in found] == ["image 0 of many", "image 1 of many"]
    assert found[1].source is not None
    assert found[1].source[found[1].index].shape == (4, 5, 6)
    table = tmp_path / "list.csv"
    write("cat/1.png", "dog/1.png")
    table.write_text("path\ncat/1.png\ndog/1.png\n")
    assert names(str(table)) == ["cat/1", "dog/1"]


def test_the_demo_is_its_photographs() -> None:
    found = named_inputs(["demo"], RGB)
    assert len(found) == 18
    assert found[4].name == "chelsea"
