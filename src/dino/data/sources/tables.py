"""Tables of images: CSV, TSV and Parquet, and which of their columns are read.

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

from dino.files import UserError

FORM = "LIST?path=COLUMN&label=COLUMN&root=DIR"

PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
"""Columns that are taken without being named, the first that there is, in any case."""


def open_text(file: Path, newline: str = "") -> TextIO:
    """A text in UTF-8, or in UTF-16 with a byte-order mark; `newline` as for `open`."""
    with file.open("rb") as stream:
        utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    return file.open(newline=newline, encoding=encoding, errors=errors)


def read_columns(file: Path, path: str | None, label: str | None) -> list[list[str]]:
    """The cells of the columns of a .csv, .tsv or .parquet file that `choose_columns` names.

    Raises:
        UserError: if a column is not there, a cell is empty, or rows may be misaligned.
        OSError: if the file cannot be read; `csv.Error` or `ValueError` if it is no table.
    """
    if file.suffix.lower() == ".parquet":
        columns = choose_columns(file, schema(file).names, path, label)
        return [read_column(file, name) for name in columns]
    with open_text(file) as text:
        separator = "\t" if file.suffix.lower() == ".tsv" else ","
        rows = csv.reader(text, delimiter=separator, strict=True)
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
                column.append(cell(file, name, row[header.index(name)], line))
    return cells


def choose_columns(
    file: Path, names: Sequence[str], path: str | None, label: str | None
) -> list[str]:
    """The column of the paths and, if there is one, that of the labels, among all names.

    By default they are the first of `PATH_COLUMNS` and of `LABEL_COLUMNS`; label "" is for none.

    Raises:
        UserError: if a column is not there, or two have the same name.
    """
    counts = Counter(name.strip() for name in names if name.strip())
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{file} has several columns called {repeated[0]!r}: rename or remove one")
    column = _column(file, names, path, PATH_COLUMNS)
    if column is None:
        raise UserError(
            f"no column of {file} is called path: it has {', '.join(names) or 'none'}; "
            f"name the one that holds the paths, as in --data '{file}?path=COLUMN'"
        )
    classes = None if label == "" else _column(file, names, label, LABEL_COLUMNS)
    return [column] if classes is None else [column, classes]


def _column(
    file: Path, names: Sequence[str], column: str | None, usual: Sequence[str]
) -> str | None:
    """A column by its name; by default the first of the usual ones in any case, if there is one."""
    if column is not None:
        for name in names:
            if name.strip() == column.strip():
                return name
        raise UserError(f"{file} has no column {column!r}: it has {', '.join(names)}")
    for known in usual:
        found = [name for name in names if name.strip().lower() == known]
        if len(found) > 1:
            raise UserError(f"{file} has the columns {' and '.join(found)}: name one, as in {FORM}")
        if found:
            return found[0]
    return None


def cell(file: Path, column: str, value: Any, place: str) -> str:
    """A cell as text, without blanks around it; `place` names it in errors, such as "line 3".

    Raises:
        UserError: if it is empty, NaN or holds a line break.
    """
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


# ---------------------------------------------------------------------------------- Parquet
def read_column(file: Path, column: str) -> list[str]:
    """The cells of a column of a Parquet table as text; see `cell`."""
    values = enumerate(values_of(file, column), 1)
    return [cell(file, column, value, f"row {row}") for row, value in values]


def values_of(file: Path, column: str) -> list[Any]:
    """The values of a column of a Parquet table."""
    values: list[Any] = parquet().read_table(file, columns=[column]).column(0).to_pylist()
    return values


def schema(file: Path) -> Any:
    """The names and types of the columns of a Parquet table, as pyarrow gives them."""
    if not os.path.isfile(file):  # noqa: PTH113, Path's may raise
        raise UserError(f"the list {file} does not exist: give --data a list or a folder")
    try:
        return parquet().read_schema(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a list: {error}") from error


def parquet() -> Any:
    """The module `pyarrow.parquet`, which is optional."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "a Parquet list needs pyarrow: pip install 'dino-ssl[parquet]', or give a CSV"
        ) from None
    return pyarrow.parquet
