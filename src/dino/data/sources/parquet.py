"""Parquet tables that hold the encoded bytes of images.

The Hugging Face hub stores images so. A table consists of groups of rows, and a group is the least
that can be read: each process keeps a few, and `Source.blocks` lets an epoch visit few at a time.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dino.data.images.image_errors import ImageError
from dino.data.sources.base import Source, number_classes
from dino.data.sources.tables import choose_columns, parquet, read_column, schema, values_of
from dino.files import UserError

IMAGE_COLUMNS = ("bytes", "image", "image_bytes", "img", "jpg", "jpeg", "png", "webp")
"""Columns of bytes that are taken for images without being named, in any case."""

MEMORY = 512 * 2**20
"""Bytes of groups of rows that a process keeps, and the most that one group may have."""


class ParquetImages(Source):
    """The images in a column of a table, as bytes or as structs {bytes, path}.

    Args:
        file: the table.
        path: column of the images, see `image_column`.
        label: column of the classes; by default the first of `tables.LABEL_COLUMNS`, if there is
            one; "" for none.
        root: folder that paths of structs without bytes start from; by default the table's.

    Raises:
        UserError: if the table is empty, lacks a label in some row, or has a group of rows of more
            than `MEMORY`.
    """

    def __init__(
        self, file: Path, path: str, *, label: str | None = None, root: str | None = None
    ) -> None:
        self.file, self.column = str(file), path
        self.root = os.path.dirname(self.file) if root is None else root  # noqa: PTH120
        about = parquet().read_metadata(file)
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
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
        self._most = int(MEMORY // max(1, largest))
        self._groups: dict[int, Any] = {}
        names = schema(file).names
        columns = choose_columns(file, names, path, label)
        if len(columns) == 2:
            self.classes, self.labels = _labels(file, columns[1], required=label is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the groups of rows: another process reads them again."""
        return {**self.__dict__, "_groups": {}}

    def __len__(self) -> int:
        """Number of images."""
        return int(self._ends[-1])

    def content(self, index: int) -> str | BinaryIO:
        """The image's bytes or its file; raises `ImageError` if there are none."""
        index = range(len(self))[index]
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[group] - self._rows[group])
        try:
            value = self._group(group)[row].as_py()
        except (OSError, ValueError, IndexError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise ImageError(
                self.path(index), str(error), "missing" if missing else "unreadable"
            ) from error
        if isinstance(value, dict):
            name = value.get("path")
            if value["bytes"] is None and name:
                return os.path.join(self.root, name)  # noqa: PTH118
            value = value["bytes"]
        if value is None:
            raise ImageError(self.path(index), "there is none in this row", "missing")
        return io.BytesIO(value)

    def _group(self, number: int) -> Any:
        if number not in self._groups:
            while len(self._groups) >= self._most:
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
    parts = (group.column(number) for number in range(group.num_columns))
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.split(".")[0] == column
    )


def _labels(
    file: Path, column: str, *, required: bool
) -> tuple[list[str], list[int]] | tuple[None, None]:
    """The classes; by the names that the hub stores beside their numbers, where it does."""
    values = values_of(file, column)
    about = json.loads((schema(file).metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(column, {}).get("names")
    if names is not None and -1 in values and not required:
        return None, None  # -1 stands for unknown, as in test parts whose answers are secret
    if names is not None and all(value in range(len(names)) for value in values):
        return names, values
    return number_classes(read_column(file, column))


def image_column(file: Path, wanted: str | None) -> str | None:
    """The column that holds encoded images; None for a table of paths.

    Args:
        file: the table.
        wanted: the column if it holds bytes; by default the only one of structs with bytes, or
            of bytes with a name in `IMAGE_COLUMNS`.

    Raises:
        UserError: if the file is no table, or there are several such columns.
    """
    about = schema(file)
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found, named = [], []
    for column in about:
        struct = pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
        if struct or holds_bytes(column.type):
            found.append(column.name)
            if struct or column.name.lower() in IMAGE_COLUMNS:
                named.append(column.name)
    if wanted is not None:
        return wanted if wanted in found else None
    if len(named) > 1:
        raise UserError(
            f"{file} has the columns of images {', '.join(named)}: name one, as in '{file}?path="
            f"{named[0]}'"
        )
    return named[0] if named else None
