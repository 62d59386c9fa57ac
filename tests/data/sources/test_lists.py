"""Lists of files: what they may look like, and what is wrong with those that are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino.data.images.image_errors import ImageError
from dino.data.sources.lists import FileList, list_settings
from dino.data.sources.open import Folder, Source, open_source
from dino.files import UserError

COLOURS = {"b/2.png": "red", "a/1.png": "blue", 'a, "x"/3.png': "red", "é #4.png": "green"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures in one colour each."""
    folder = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(folder / name)
    return folder


def text(root: Path, **_: str) -> Path:
    path = root / "list.txt"
    path.write_text("\ufeff" + "\r\n".join(COLOURS) + "\n\n", encoding="utf-8")
    return path


def table(root: Path, path: str = "path", label: str = "label", separator: str = ",") -> Path:
    file = root / ("list.csv" if separator == "," else "list.tsv")
    rows = [f'"{name.replace(chr(34), 2 * chr(34))}"{separator}{COLOURS[name]}' for name in COLOURS]
    file.write_text("\n".join([f"{path}{separator}{label}", *rows]), encoding="utf-8")
    return file


def tabbed(root: Path, path: str = "path", label: str = "label") -> Path:
    return table(root, path, label, "\t")


def parquet(root: Path, path: str = "path", label: str = "label") -> Path:
    file = root / "list.parquet"
    columns = {path: list(COLOURS), "size": [4] * 4, label: list(COLOURS.values())}
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("write", [text, table, tabbed, parquet])
def test_images_in_the_order_of_the_list(root: Path, write: Callable[..., Path]) -> None:
    source = open_source(write(root))
    assert isinstance(source, Source)
    assert isinstance(source, FileList)
    assert [source.path(i) for i in range(len(source))] == [str(root / name) for name in COLOURS]
    for index, colour in enumerate(COLOURS.values()):
        assert source[index].tobytes() == Image.new("RGB", (4, 4), colour).tobytes()
    if write is text:
        assert (source.labels, source.classes) == (None, None)
    else:
        assert source.classes == ["blue", "green", "red"]
        assert source.labels == [2, 0, 2, 1]


@pytest.mark.parametrize("write", [table, tabbed, parquet])
def test_columns_and_root_can_be_named(
    root: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    file = write(root, path="where", label="Species")
    elsewhere = file.rename(tmp_path / file.name)
    with pytest.raises(
        UserError, match=r"no column .* is called path: it has .*where.*path=COLUMN"
    ):
        open_source(elsewhere)
    with pytest.raises(UserError, match=r"the first image of .*list.*root=FOLDER"):
        open_source(f"{elsewhere}?path=where")
    source = open_source(f"{elsewhere}?path=where&root={root}")
    assert source.labels is None
    source = open_source(f"{elsewhere}?path=where&root={root}&label=Species")
    assert source.classes == ["blue", "green", "red"]
    with pytest.raises(UserError, match=r"has no column 'species': it has .*Species"):
        open_source(f"{elsewhere}?path=where&root={root}&label=species")


def test_usual_names_are_found_in_any_case_and_labels_can_be_left_out(root: Path) -> None:
    source = open_source(table(root, path="FileName", label="CLASS"))
    assert source.classes == ["blue", "green", "red"]
    assert open_source(f"{root / 'list.csv'}?label=").labels is None


def test_numbers_are_ordered_as_numbers(root: Path) -> None:
    (root / "list.csv").write_text("path,label\nb/2.png,10\na/1.png,9\nb/2.png,-1\n")
    source = open_source(root / "list.csv")
    assert source.classes == ["-1", "9", "10"]
    assert source.labels == [2, 1, 0]


def test_absolute_paths_need_no_root(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.lst").write_text(f"{root / 'b/2.png'}\n")
    assert open_source(tmp_path / "list.lst").path(0) == str(root / "b/2.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist"),
        ("empty.txt", "\n \n", "is empty"),
        ("empty.csv", "", "no column of .* it has none"),
        ("header.csv", "path,label\n", "is empty"),
        ("short.csv", "path,label\nb/2.png\n", "line 2 of .* has 1 fields, its header 2"),
        ("gap.csv", "path,label\nb/2.png,\n", r"line 2 of .* has no label: fill it in \(labels"),
        ("nopath.csv", "path,label\nb/2.png,x\n,y\n", "line 3 of .* has no path"),
        ("no.parquet", "text", "cannot be read as a list"),
        ("twice.csv", "path,label,label\nb/2.png,x,y\n", "several columns called 'label': rename"),
        ("case.csv", "path,Label,LABEL\nb/2.png,x,y\n", "the columns Label and LABEL: name one"),
        ("blank.csv", "path, path \nb/2.png,x\n", "several columns called 'path'"),
        ("again.csv", "path,label\nb/2.png,x\npath,label\n", "line 3 of .* is its header again"),
        ("long.csv", "path,label\nb/2.png,x\nb/2.png,x,y\n", "line 3 .* 3 fields, its header 2"),
        ("open.csv", 'path,label\nb/2.png,"x\na/1.png,y\n', "cannot be read .*unexpected end"),
        ("stray.csv", 'path,label\nb/2.png,"x\na/1.png,y"\n', "ends on line 3 of .* line break"),
        ("white.csv", "path,label\nb/2.png,  \n", "line 2 of .* has no label"),
        ("wide.tsv", "path\tlabel\nb/2.png\tx\ty\n", "line 2 of .* has 3 fields"),
    ],
)
def test_mistakes_are_one_sentence(
    root: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(root / name)
    assert "\n" not in str(caught.value)


def test_blanks_around_columns_and_cells_do_not_count(root: Path) -> None:
    rows = "\ufeff path , label\n b/2.png, red\na/1.png ,blue \nb/2.png,red\n"
    (root / "list.csv").write_text(rows, encoding="utf-8")
    (root / "wide.csv").write_text(rows.removeprefix("\ufeff"), encoding="utf-16")
    for name in ("list.csv", "wide.csv", "list.csv?path=path&label= label"):
        source = open_source(f"{root}/{name}")
        assert source.path(1) == str(root / "a/1.png")
        assert (source.classes, source.labels) == (["blue", "red"], [1, 0, 1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["b/2.png", None]}, "row 2 of .* has no path"),
        ({"path": ["b/2.png", "a/1.png"], "label": [0.0, float("nan")]}, "row 2 .* has no label"),
        ({"path": ["b/2.png"], " path": ["a/1.png"]}, "several columns called 'path'"),
    ],
)
def test_rows_of_a_parquet_table(root: Path, columns: dict[str, list], message: str) -> None:
    pq.write_table(pa.table(columns), root / "list.parquet")
    with pytest.raises(UserError, match=message):
        open_source(root / "list.parquet")


def test_blanks_in_the_names_of_a_parquet_table(root: Path) -> None:
    columns = {" Path": ["b/2.png", "a/1.png"], "label ": ["x ", "y"]}
    pq.write_table(pa.table(columns), root / "list.parquet")
    assert open_source(root / "list.parquet").classes == ["x", "y"]


def test_the_digest_does_not_depend_on_where_images_lie(root: Path, tmp_path: Path) -> None:
    def absolute(name: str) -> str:
        lines = [
            f"{root}/{image},{colour}" for image, colour in COLOURS.items() if "," not in image
        ]
        (tmp_path / name).write_text("\n".join(["path,label", *lines]))
        return open_source(tmp_path / name).digest()

    digest = absolute("one.csv")
    source = open_source(tmp_path / "one.csv")
    assert source.path(0) == f"{root}/b/2.png"
    root = root.rename(tmp_path / "moved")
    assert absolute("two.csv") == digest
    assert open_source(f"{tmp_path}/two.csv?label=").digest() != digest


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_in_a_list_are_not_read(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "list.txt").write_text(f"{next(iter(COLOURS))}\npipe.png\n/dev/zero\n.\n")
    source = open_source(root / "list.txt")
    for index, reason in enumerate(["no regular file", "no regular file", "Is a directory"], 1):
        with pytest.raises(ImageError, match=reason) as caught:
            source[index]
        assert caught.value.defect == "unreadable"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_no_list(tmp_path: Path) -> None:
    for name in ("a.csv", "a.txt", "a.parquet", "a.npy", "a.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=r"does not exist|no regular file"):
            open_source(tmp_path / name)


def test_settings_of_a_list(root: Path) -> None:
    assert list_settings("a.csv") == ("a.csv", {})
    assert list_settings("A.CSV?path=x&root=/c++/a=b") == (
        "A.CSV",
        {"path": "x", "root": "/c++/a=b"},
    )
    assert list_settings("what?.txt") == ("what?.txt", {})
    assert list_settings("folder") is None
    assert list_settings("folder?path=x") is None
    with pytest.raises(UserError, match=r"'column' is no setting of a list"):
        list_settings("a.csv?column=x")
    with pytest.raises(UserError, match="has no columns"):
        open_source(f"{text(root)}?label=x")


def test_a_folder_may_be_called_like_a_list(root: Path) -> None:
    assert isinstance(open_source(root.rename(root.with_name("pictures.csv"))), Folder)
