"""Lists of image files: text with one path a line, or tables in CSV, TSV or Parquet.

On the command line the settings of a list are written like those of a web address:

    --data plankton.csv
    --data "plankton.csv?path=filename&label=species&root=/data/plankton"

Blanks around the names of columns, paths and labels are removed. A table whose rows might be
misaligned (columns of one name, rows of other lengths, stray quotes) is refused.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dino.data.sources.base import needs_extra, number_classes, shared_folder, split_settings
from dino.data.sources.folder import ImageFiles
from dino.files import UserError

FORM = "LIST?path=COLUMN&label=COLUMN&root=DIR"
TEXT, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
"""Endings of lists, in any case."""
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
"""Columns that are taken without being named, the first that exists, in any case."""


class FileList(ImageFiles):
    """The images that a list names, in its order.

    Args:
        file: .txt or .lst with one path a line; .csv, .tsv or .parquet with a header.
        root: folder that relative paths start from; by default the folder of the list.
        path: column of the paths; by default the first of `PATH_COLUMNS`.
        label: column of the classes; by default the first of `LABEL_COLUMNS`, if there is one; ""
            for none. Classes are numbered in the order of their names, integers by size.

    Raises:
        UserError: if the list is missing, empty or of another format, lacks a column or, in some
            row, a path or a label, may be misaligned, or if its first image does not exist.
    """

    def __init__(
        self, file: Path, root: str | None = None, path: str | None = None, label: str | None = None
    ) -> None:
        if not os.path.isfile(file):  # noqa: PTH113, Path's may raise
            raise UserError(f"the list {file} does not exist: give --data a list or a folder")
        try:
            paths, *labels = _read_columns(file, path, label)
        except UserError:
            raise
        except (OSError, csv.Error, ValueError) as error:
            raise UserError(f"{file} cannot be read as a list: {error}") from error
        if not paths:
            raise UserError(f"the list {file} is empty: it must name one image a line")
        folder = file.parent if root is None else Path(root)
        # The folder that all paths share may differ between machines, and the digest must not.
        if shared := shared_folder(paths):
            folder, paths = Path(shared), [name[len(shared) :].lstrip("/\\") for name in paths]
        super().__init__(folder, paths)
        if not os.path.exists(first := self.path(0)):  # noqa: PTH110
            raise UserError(
                f"{first}, the first image of {file}, does not exist: name the folder where "
                f"the paths start, as in --data '{file}?root=FOLDER'"
            )
        if labels:
            self.classes, self.labels = number_classes(*labels)


def list_settings(data: str) -> tuple[str, dict[str, str]] | None:
    """A list's file and settings, or None if `data` does not end, before any "?", like a list.

    Raises:
        UserError: for settings that are not `path`, `label` or `root`.
    """
    endings = (*TEXT, *TABLES)
    if data.lower().endswith(endings):  # also a name with a question mark
        return data, {}
    has_settings = data.rpartition("?")[0].lower().endswith(endings)
    return split_settings(data, FORM, "a list") if has_settings else None


def _read_columns(file: Path, path: str | None, label: str | None) -> list[list[str]]:
    """The paths and, if there is a column of them, the labels."""
    ending = file.suffix.lower()
    if ending == ".parquet":
        columns = choose_columns(file, schema(file).names, path, label)
        return [read_column(file, name) for name in columns]
    if ending in TEXT:
        if path or label:
            raise UserError(f"{file} is a list of paths and has no columns")
        with _open_text(file, "\n") as text:
            lines = [line.rstrip("\r\n") for line in text]
        return [[line for line in lines if line.strip()]]
    with _open_text(file, "") as text:
        rows = csv.reader(text, delimiter="\t" if ending == ".tsv" else ",", strict=True)
        header = next(rows, [])
        columns = choose_columns(file, header, path, label)
        cells: list[list[str]] = [[] for _ in columns]
        for row in filter(None, rows):
            line = f"line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(
                    f"{line} of {file} has {len(row)} fields, its header {len(header)}: "
                    "quote fields that hold the separator"
                )
            if row == header:
                raise UserError(f"{line} of {file} is its header again: remove it")
            for name, column in zip(columns, cells, strict=True):
                column.append(_cell(file, name, row[header.index(name)], line))
    return cells


def _open_text(file: Path, newline: str) -> TextIO:
    """A text in UTF-8, or in UTF-16 with a byte-order mark; `newline` as for `open`."""
    with file.open("rb") as stream:
        utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    return file.open(newline=newline, encoding=encoding, errors=errors)


def _cell(file: Path, column: str, value: Any, place: str) -> str:
    """A cell as text, without blanks around it; `place` names it in errors, such as "line 3"."""
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise UserError(
            f"{place} of {file} has no {column}: fill it in (labels can be left out with "
            f"'{file}?label=')"
        )
    if "\n" in text or "\r" in text:
        raise UserError(
            f"the {column} that ends on {place} of {file} holds a line break: "
            "a quotation mark may be missing before"
        )
    return text


# ---------------------------------------------------------------------------------- columns
def choose_columns(file: Path, names: list[str], path: str | None, label: str | None) -> list[str]:
    """The column of the paths and, if there is one, that of the labels; see `FileList`.

    Raises:
        UserError: if a column is not there, or two have the same name.
    """
    counts = Counter(name.strip() for name in names if name.strip())
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{file} has several columns called {repeated[0]!r}: rename or remove one")
    columns = _column(file, names, path, PATH_COLUMNS)
    if not columns:
        raise UserError(
            f"no column of {file} is called path: it has {', '.join(names) or 'none'}; "
            f"name the one that holds the paths, as in --data '{file}?path=COLUMN'"
        )
    return columns if label == "" else columns + _column(file, names, label, LABEL_COLUMNS)


def _column(file: Path, names: list[str], column: str | None, usual: Sequence[str]) -> list[str]:
    """A column by its name; by default the first of the usual ones, or none."""
    if column is not None:
        if found := [name for name in names if name.strip() == column.strip()]:
            return found
        raise UserError(f"{file} has no column {column!r}: it has {', '.join(names)}")
    for known in usual:
        found = [name for name in names if name.strip().lower() == known]
        if len(found) > 1:
            raise UserError(f"{file} has the columns {' and '.join(found)}: name one, as in {FORM}")
        if found:
            return found
    return []


# ---------------------------------------------------------------------------------- Parquet
def read_column(file: Path, column: str) -> list[str]:
    """The cells of a column of a Parquet table as text.

    Raises:
        UserError: if a cell is empty, NaN or holds a line break.
    """
    values = enumerate(values_of(file, column), 1)
    return [_cell(file, column, value, f"row {row}") for row, value in values]


def values_of(file: Path, column: str) -> list[Any]:
    """The values of a column of a Parquet table."""
    return parquet().read_table(file, columns=[column]).column(0).to_pylist()


def schema(file: Path) -> Any:
    """The names and types of the columns of a Parquet table, as a `pyarrow.Schema`.

    Raises:
        UserError: if the file is missing or no Parquet table.
    """
    if not os.path.isfile(file):  # noqa: PTH113, Path's may raise
        raise UserError(f"the list {file} does not exist: give --data a list or a folder")
    try:
        return parquet().read_schema(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a list: {error}") from error


def parquet() -> Any:
    """The module `pyarrow.parquet`."""
    with needs_extra("parquet", "a Parquet table"):
        import pyarrow.parquet
    return pyarrow.parquet
