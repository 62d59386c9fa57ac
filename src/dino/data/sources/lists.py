"""Lists of image files: one path a line in a text file, or a column of a CSV or Parquet table.

On the command line the settings of a list follow it like those of a web address:

    --data plankton.csv
    --data "plankton.csv?path=filename&label=species&root=/data/plankton"
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino.data.sources.packed_strings import Files, numbered
from dino.data.sources.query import parse
from dino.files import UserError

TEXT, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
"""Endings of lists, in any case."""

PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
"""Columns that are taken without being named, the first that there is, in any case."""


class FileList(Files):
    """The images that a list names, in its order.

    Args:
        file: .txt or .lst with one path a line; .csv, .tsv or .parquet with a header.
        root: folder that relative paths start from; by default the list's own.
        path: column of the paths; by default the first of `PATH_COLUMNS`.
        label: column of the classes; by default the first of `LABEL_COLUMNS`, if there is one; ""
            for none. Classes are numbered in the order of their names, whole numbers by size.

    Raises:
        UserError: if the list is missing, empty or not what its name says, lacks a column or, in
            some row, a path or a label, or if its first image does not exist.
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
        if not self.file.is_file():
            raise UserError(f"the list {self.file} does not exist: give --data a list or a folder")
        paths, labels = self._read(path, label)
        if not paths:
            raise UserError(f"the list {self.file} is empty: it must name one image a line")
        super().__init__(self.file.parent if root is None else Path(root), paths)
        first = Path(self.path(0))
        if not first.exists():
            raise UserError(
                f"{first}, the first image of {self.file}, does not exist: say where the paths "
                f"start, as in --data '{self.file}?root=FOLDER'"
            )
        self.classes: list[str] | None = None
        self.labels: list[int] | None = None
        if labels is not None:
            self.classes, self.labels = numbered(labels)

    # ------------------------------------------------------------------ reading
    def _read(self, path: str | None, label: str | None) -> tuple[list[str], list[str] | None]:
        suffix = self.file.suffix.lower()
        try:
            if suffix in TEXT:
                if path or label:
                    raise UserError(f"{self.file} is a list of paths and has no columns")
                # Only line feeds end a line: other separators may be part of a name.
                text = self.file.read_text(encoding="utf-8-sig", errors="surrogateescape")
                lines = (line.rstrip("\r") for line in text.split("\n"))
                return [line for line in lines if line.strip()], None
            table = self._parquet() if suffix == ".parquet" else self._csv(suffix)
        except (OSError, csv.Error, ValueError) as error:
            raise UserError(f"{self.file} cannot be read as a list: {error}") from error
        return self._columns(table, path, label)

    def _csv(self, suffix: str) -> dict[str, list[Any]]:
        with self.file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
            header = next(rows, [])
            table: dict[str, list[Any]] = {name: [] for name in header}
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"line {rows.line_num} of {self.file} has {len(row)} fields, "
                        f"its header {len(header)}: quote fields that hold the separator"
                    )
                for name, value in zip(header, row, strict=True):
                    table[name].append(value)
        return table

    def _parquet(self) -> dict[str, list[Any]]:
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(
                "a Parquet list needs pyarrow: pip install 'dino-ssl[parquet]', or give a CSV"
            ) from None
        # The wanted columns alone would do, but which they are is known only from the names.
        names = set(pq.read_schema(self.file).names)
        columns: dict[str, list[Any]] = pq.read_table(self.file, columns=sorted(names)).to_pydict()
        return columns

    def _columns(
        self, table: dict[str, list[Any]], path: str | None, label: str | None
    ) -> tuple[list[str], list[str] | None]:
        column = self._column(table, path, PATH_COLUMNS)
        if column is None:
            raise UserError(
                f"no column of {self.file} is called path: it has {', '.join(table) or 'none'}; "
                f"name the one that holds the paths, as in --data '{self.file}?path=COLUMN'"
            )
        classes = None if label == "" else self._column(table, label, LABEL_COLUMNS)
        paths = self._filled(table[column], column, "")
        advice = f" (or leave labels out with '{self.file}?label=')"
        return paths, None if classes is None else self._filled(table[classes], classes, advice)

    def _column(
        self, table: dict[str, list[Any]], wanted: str | None, known: Sequence[str]
    ) -> str | None:
        if wanted is not None:
            if wanted not in table:
                raise UserError(f"{self.file} has no column {wanted!r}: it has {', '.join(table)}")
            return wanted
        lower = {name.lower(): name for name in reversed(list(table))}
        return next((lower[name] for name in known if name in lower), None)

    def _filled(self, values: list[Any], column: str, advice: str) -> list[str]:
        for row, value in enumerate(values, start=1):
            if value is None or value == "":
                raise UserError(f"row {row} of {self.file} has no {column}: fill it in{advice}")
        return [str(value) for value in values]


def split_settings(data: str) -> tuple[str, dict[str, str]] | None:
    """A list's file and settings, or None if `data` does not end, before any "?", like a list.

    Raises:
        UserError: for settings that are not `path`, `label` or `root`.
    """
    if data.lower().endswith((*TEXT, *TABLES)):  # also a name with a question mark
        return data, {}
    file, mark, query = data.rpartition("?")
    if not (mark and file.lower().endswith((*TEXT, *TABLES))):
        return None
    return file, parse(query, "LIST?path=COLUMN&label=COLUMN&root=DIR", "a list")
