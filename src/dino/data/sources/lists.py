"""Lists of image files: one path a line in a text file, or a column of a CSV or Parquet table.

On the command line the settings of a list follow it like those of a web address:

    --data plankton.csv
    --data "plankton.csv?path=filename&label=species&root=/data/plankton"

Blanks around the names of columns, paths and labels of a table do not count. A table whose rows
might be misaligned (columns of one name, rows of other lengths, stray quotes) is refused.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dino.data.sources.base import number_classes, shared_folder, split_settings
from dino.data.sources.folder import ImageFiles
from dino.files import UserError

TEXT, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
"""Endings of lists, in any case."""

FORM = "LIST?path=COLUMN&label=COLUMN&root=DIR"

PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
"""Columns that are taken without being named, the first that there is, in any case."""


class FileList(ImageFiles):
    """The images that a list names, in its order.

    Args:
        file: .txt or .lst with one path a line; .csv, .tsv or .parquet with a header.
        root: folder that relative paths start from; by default the list's own.
        path: column of the paths; by default the first of `PATH_COLUMNS`.
        label: column of the classes; by default the first of `LABEL_COLUMNS`, if there is one; ""
            for none. Classes are numbered in the order of their names, whole numbers by size.

    Raises:
        UserError: if the list is missing, empty or not what its name says, lacks a column or, in
            some row, a path or a label, may be misaligned, or if its first image does not exist.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        path: str | None = None,
        label: str | None = None,
    ) -> None:
        self.file = Path(file)
        if not os.path.isfile(file):  # noqa: PTH113, Path's may raise
            raise UserError(f"the list {self.file} does not exist: give --data a list or a folder")
        try:
            paths, labels = self._read(path, label)
        except UserError:
            raise
        except (OSError, csv.Error, ValueError) as error:
            raise UserError(f"{self.file} cannot be read as a list: {error}") from error
        if not paths:
            raise UserError(f"the list {self.file} is empty: it must name one image a line")
        folder = self.file.parent if root is None else Path(root)
        # What all paths begin with may differ between machines, and the digest must not.
        if shared := shared_folder(paths):
            folder, paths = Path(shared), [name[len(shared) :].lstrip("/\\") for name in paths]
        super().__init__(folder, paths)
        if not os.path.exists(first := self.path(0)):  # noqa: PTH110
            raise UserError(
                f"{first}, the first image of {self.file}, does not exist: say where the paths "
                f"start, as in --data '{self.file}?root=FOLDER'"
            )
        if labels is not None:
            self.classes, self.labels = number_classes(labels)

    def _read(self, path: str | None, label: str | None) -> tuple[list[str], list[str] | None]:
        suffix = self.file.suffix.lower()
        if suffix in TEXT:
            if path or label:
                raise UserError(f"{self.file} is a list of paths and has no columns")
            with self._text() as file:
                lines = [line.rstrip("\r\n") for line in file]
            return [line for line in lines if line.strip()], None
        if suffix == ".parquet":
            from dino.data.sources.parquet import column_names, read_column

            columns = choose_columns(self.file, column_names(self.file), path, label)
            cells = [read_column(self.file, name) for name in columns]
        else:
            cells = self._csv("\t" if suffix == ".tsv" else ",", path, label)
        return cells[0], cells[1] if len(cells) == 2 else None

    def _text(self) -> TextIO:
        with self.file.open("rb") as file:
            utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
        # Only line feeds end a line: other separators may be part of a name.
        return self.file.open(newline="\n", encoding=encoding, errors=errors)

    def _csv(self, separator: str, path: str | None, label: str | None) -> list[list[str]]:
        with self._text() as file:
            rows = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(rows, [])]
            columns = choose_columns(self.file, header, path, label)
            cells: list[list[str]] = [[] for _ in columns]
            for row in filter(None, rows):
                line = rows.line_num
                if len(row) != len(header):
                    raise UserError(
                        f"line {line} of {self.file} has {len(row)} fields, its header "
                        f"{len(header)}: quote fields that hold the separator"
                    )
                if [name.strip() for name in row] == header:
                    raise UserError(f"line {line} of {self.file} is its header again: remove it")
                for name, found in zip(columns, cells, strict=True):
                    found.append(cell(self.file, name, row[header.index(name)], "line", line))
        return cells


def choose_columns(
    file: Path, names: Sequence[str], path: str | None, label: str | None
) -> list[str]:
    """The column of the paths and, if there is one, that of the labels.

    Args:
        file: of the table.
        names: of all its columns.
        path: name of the first; by default one of `PATH_COLUMNS`.
        label: name of the second; by default one of `LABEL_COLUMNS`; "" for none.

    Raises:
        UserError: if a column is not there, or two have the same name.
    """
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"{file} has several columns called {twice[0]!r}: rename or remove one")
    column = _column(file, names, path, PATH_COLUMNS)
    if column is None:
        raise UserError(
            f"no column of {file} is called path: it has {', '.join(names) or 'none'}; "
            f"name the one that holds the paths, as in --data '{file}?path=COLUMN'"
        )
    classes = None if label == "" else _column(file, names, label, LABEL_COLUMNS)
    return [column] if classes is None else [column, classes]


def _column(
    file: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str]
) -> str | None:
    if wanted is not None and wanted not in names:
        raise UserError(f"{file} has no column {wanted!r}: it has {', '.join(names)}")
    if wanted is not None:
        return wanted
    for known in usual:
        found = [name for name in names if name.lower() == known]
        if len(found) > 1:
            raise UserError(f"{file} has the columns {' and '.join(found)}: name one, as in {FORM}")
        if found:
            return found[0]
    return None


def cell(file: Path, column: str, value: Any, unit: str, number: int) -> str:
    """A cell as text, without blanks around it.

    Raises:
        UserError: if it is empty, NaN or holds a line break, naming its place, such as "line 3".
    """
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise UserError(
            f"{unit} {number} of {file} has no {column}: fill it in (labels can be left out with "
            f"'{file}?label=')"
        )
    if "\n" in text:
        raise UserError(
            f"the {column} that ends on {unit} {number} of {file} holds a line break: "
            "a quotation mark may be missing before"
        )
    return text


def list_settings(data: str) -> tuple[str, dict[str, str]] | None:
    """A list's file and settings, or None if `data` does not end, before any "?", like a list.

    Raises:
        UserError: for settings that are not `path`, `label` or `root`.
    """
    if data.lower().endswith((*TEXT, *TABLES)):  # also a name with a question mark
        return data, {}
    file, mark, _ = data.rpartition("?")
    if not (mark and file.lower().endswith((*TEXT, *TABLES))):
        return None
    return split_settings(data, FORM, "a list")
