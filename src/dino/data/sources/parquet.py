"""Parquet tables with the encoded bytes of images, as on the Hugging Face hub.

A table is read by groups of rows: each process caches a few, and `Source.blocks` lets an epoch
visit few at a time.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dino.data.images.image_errors import ImageError
from dino.data.sources.base import Source, image_errors, number_classes
from dino.data.sources.lists import choose_columns, parquet, read_column, schema, values_of
from dino.files import UserError

IMAGE_COLUMNS = ("bytes", "image", "image_bytes", "img", "jpg", "jpeg", "png", "webp")
"""Columns of bytes that are taken for images without being named, in any case."""

MEMORY = 512 * 2**20
"""Bytes of groups of rows that a process caches, and the most that one group may have."""


class ParquetImages(Source):
    """The images in a column of a table, as bytes or as structs {bytes, path}.

    Args:
        file: the table.
        path: column of the images, see `image_column`.
        label: column of the classes; by default the first of `lists.LABEL_COLUMNS`, if there is
            one; "" for none.
        root: folder that paths of structs without bytes start from; by default the table's.

    Raises:
        UserError: if the table is empty, lacks a label in some row, or has a group of rows of more
            than `MEMORY`.
    """

    def __init__(
        self, file: Path, path: str, *, label: str | None = None, root: str | None = None
    ) -> None:
        self.file, self.column = file, path
        self.root = os.path.dirname(file) if root is None else root  # noqa: PTH120
        metadata = parquet().read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.blocks = self._rows = np.array([group.num_rows for group in groups], np.int64)
        self._ends = np.cumsum(self._rows)
        self._sizes = np.array([_bytes_of(group, path) for group in groups], dtype=np.int64)
        if not self._rows.sum():
            raise UserError(f"{file} is empty: give --data a table with images")
        if (largest := max(self._sizes)) > MEMORY:
            raise UserError(
                f"a group of rows of {file} has {largest >> 20:,} MiB of images, too many to read "
                "for a single one: write it again with row_group_size=100"
            )
        self._max_groups = int(MEMORY // max(1, largest))
        self._groups: dict[int, Any] = {}
        _, *label_column = choose_columns(file, schema(file).names, path, label)
        if label_column:
            self._read_labels(*label_column, required=label is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the groups of rows: another process reads them again."""
        return {**self.__dict__, "_groups": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def content(self, index: int) -> str | BinaryIO:
        """The image's bytes or its file; raises `ImageError` if there are none."""
        index = range(len(self))[index]
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[group] - self._rows[group])
        with image_errors(self.path(index), "unreadable"):
            value = self._group(group)[row].as_py()
        if isinstance(value, dict):
            if value["bytes"] is None and value.get("path"):
                return os.path.join(self.root, value["path"])  # noqa: PTH118
            value = value["bytes"]
        if value is None:
            raise ImageError(self.path(index), "there is none in this row", "missing")
        return io.BytesIO(value)

    def _read_labels(self, column: str, *, required: bool) -> None:
        """Read the labels, and the class names that the hub stores in the table's metadata."""
        values = values_of(self.file, column)
        stored = json.loads((schema(self.file).metadata or {}).get(b"huggingface", b"{}"))
        names = stored.get("info", {}).get("features", {}).get(column, {}).get("names")
        if names is not None and all(value in range(len(names)) for value in values):
            self.classes, self.labels = names, values
        # -1 stands for unknown, as in test sets with secret labels.
        elif names is None or -1 not in values or required:
            self.classes, self.labels = number_classes(read_column(self.file, column))

    def _group(self, number: int) -> Any:
        if number not in self._groups:
            while len(self._groups) >= self._max_groups:
                del self._groups[next(iter(self._groups))]
            # Opened anew each time: a process that was forked must share no position in a file.
            with parquet().ParquetFile(self.file) as opened:
                rows = opened.read_row_group(number, columns=[self.column], use_threads=False)
            self._groups[number] = rows.column(0).combine_chunks()
        return self._groups[number]

    def path(self, index: int) -> str:
        """The image's row, counted from 0."""
        return f"row {range(len(self))[index]} of {self.file}"

    def identity(self) -> list[bytes]:
        """Rows and bytes of each group."""
        return [self._rows.tobytes(), self._sizes.tobytes()]


def _bytes_of(group: Any, column: str) -> int:
    leaves = (group.column(number) for number in range(group.num_columns))
    chosen = (leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] == column)
    return sum(leaf.total_uncompressed_size for leaf in chosen)


def image_column(file: Path, column: str | None) -> str | None:
    """The column that holds encoded images; None for a table of paths.

    It is the given one if that holds bytes; by default the only one of structs with bytes, or of
    bytes with a name in `IMAGE_COLUMNS`.

    Raises:
        UserError: if the file is no table, or there are several such columns.
    """
    columns = schema(file)
    from pyarrow.types import is_binary, is_large_binary, is_struct

    structs = [
        c.name for c in columns if is_struct(c.type) and c.type.get_field_index("bytes") >= 0
    ]
    binary = [c.name for c in columns if is_binary(c.type) or is_large_binary(c.type)]
    if column is not None:
        return column if column in structs + binary else None
    found = structs + [name for name in binary if name.lower() in IMAGE_COLUMNS]
    if len(found) > 1:
        raise UserError(
            f"{file} has the columns of images {', '.join(found)}: name one, as in "
            f"'{file}?path={found[0]}'"
        )
    return found[0] if found else None
