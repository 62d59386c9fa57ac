"""Lists of files: what they may look like, and what is wrong with those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino.data.sources.lists import FileList, list_settings
from dino.data.sources.open import Folder, Source, open_source
from dino.files import UserError

COLOURS = {"b/2.png": "red", "a/1.png": "blue", 'a, "x"/3.png': "red", "é #4.png": "green"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures whose colour can be asked for."""
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
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    root: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(root / name)
    assert "\n" not in str(caught.value)


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
