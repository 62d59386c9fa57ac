"""Lists of image files: one path a line in a text file, or a column of a CSV or Parquet table.

On the command line the settings of a list are written like those of a web address:

    --data plankton.csv
    --data "plankton.csv?path=filename&label=species&root=/data/plankton"
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from dino.data.sources.base import number_classes, shared_folder, split_settings
from dino.data.sources.folder import ImageFiles
from dino.data.sources.tables import FORM, open_text, read_columns
from dino.files import UserError

TEXT, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
"""Endings of lists, in any case."""


class FileList(ImageFiles):
    """The images that a list names, in its order.

    Args:
        file: .txt or .lst with one path a line; .csv, .tsv or .parquet with a header.
        root: folder that relative paths start from; by default the folder of the list.
        path: column of the paths; by default the first of `tables.PATH_COLUMNS`.
        label: column of the classes; by default the first of `tables.LABEL_COLUMNS`, if there is
            one; "" for none. Classes are numbered in the order of their names, integers by size.

    Raises:
        UserError: if the list is missing, empty or of another format, lacks a column or, in some
            row, a path or a label, may be misaligned, or if its first image does not exist.
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
            paths, *labels = self._read(path, label)
        except UserError:
            raise
        except (OSError, csv.Error, ValueError) as error:
            raise UserError(f"{self.file} cannot be read as a list: {error}") from error
        if not paths:
            raise UserError(f"the list {self.file} is empty: it must name one image a line")
        folder = self.file.parent if root is None else Path(root)
        # The folder that all paths share may differ between machines, and the digest must not.
        if shared := shared_folder(paths):
            folder, paths = Path(shared), [name[len(shared) :].lstrip("/\\") for name in paths]
        super().__init__(folder, paths)
        if not os.path.exists(first := self.path(0)):  # noqa: PTH110
            raise UserError(
                f"{first}, the first image of {self.file}, does not exist: name the folder where "
                f"the paths start, as in --data '{self.file}?root=FOLDER'"
            )
        if labels:
            self.classes, self.labels = number_classes(*labels)

    def _read(self, path: str | None, label: str | None) -> list[list[str]]:
        """The paths and, if there is a column of them, the labels."""
        if self.file.suffix.lower() not in TEXT:
            return read_columns(self.file, path, label)
        if path or label:
            raise UserError(f"{self.file} is a list of paths and has no columns")
        with open_text(self.file, "\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
        return [[line for line in lines if line.strip()]]


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
