"""Data sets of the package `datasets`: by name from the hub, or from a local folder.

The folder is one that `save_to_disk` wrote, or one of pictures or Parquet files:

    --data "hf:cifar100?split=train&label=fine_label"
    --data hf:saved/
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dino.data.images.image_errors import ImageError
from dino.data.sources.base import Source, needs_extra, number_classes, split_settings
from dino.data.sources.lists import LABEL_COLUMNS
from dino.data.sources.parquet import IMAGE_COLUMNS
from dino.files import UserError

FORM = "hf:NAME?split=SPLIT&image=COLUMN&label=COLUMN&config=NAME"


class HubImages(Source):
    """The images of one column of a data set. Its tables stay on the disk, mapped into memory.

    Args:
        data: NAME and settings, as in `FORM` without its beginning. The split is "train" by
            default, or the only one. The image's column is found by its type. Labels are the column
            of classes, or the first of `dino.data.sources.lists.LABEL_COLUMNS`; "label=" for none.

    Raises:
        UserError: if `datasets` is not installed or cannot open the data set, or if the split or
            a column is missing or ambiguous.
    """

    def __init__(self, data: str) -> None:
        name, settings = split_settings(data, FORM, "data sets of the hub")
        if not name:
            raise UserError(f"hf: lacks the name of a data set: write {FORM}")
        self.name = f"hf:{name}"
        with needs_extra("hf", self.name):
            import datasets
        table = _opened(datasets, name, settings.get("config"), settings.get("split"))
        if len(table) == 0:
            raise UserError(f"{self.name} is empty: choose another split")
        kinds = table.features.items()
        images = [column for column, kind in kinds if isinstance(kind, datasets.Image)]
        images = images or [column for column, kind in kinds if _holds_bytes(column, kind)]
        classes = [column for column, kind in kinds if isinstance(kind, datasets.ClassLabel)]
        if not images:
            columns = ", ".join(table.column_names)
            raise UserError(f"{self.name} has no column of the type Image: it has {columns}")
        self._column = self._one(settings.get("image"), images, images, "image")
        # Bytes as they are stored, for `open_image`.
        self._table = table.select_columns([self._column]).cast_column(
            self._column, datasets.Image(decode=False)
        )
        label = settings.get("label")
        lower = {column.lower(): column for column in reversed(table.column_names)}
        usual = [lower[key] for key in LABEL_COLUMNS if key in lower and key != self._column]
        found = [column for column in usual if column in classes][:1] or classes or usual[:1]
        if label or (label is None and found):
            column = self._one(label, table.column_names, found, "label")
            self._read_labels(table, column, required=label is not None)

    def __len__(self) -> int:
        return len(self._table)

    def content(self, index: int) -> str | BinaryIO:
        """The image's bytes or its file; raises `ImageError` if there are none."""
        item = self._table[index][self._column]
        if item is None:
            raise ImageError(self.path(index), "there is none in this row", "missing")
        return item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])

    def path(self, index: int) -> str:
        """The image's row."""
        return f"row {index} of {self.name}"

    def identity(self) -> list[bytes]:
        """The first, middle and last image: its bytes, or the name of its file."""
        rows = (self._table[i][self._column] or {} for i in {0, len(self) // 2, len(self) - 1})
        names = ((row.get("bytes"), os.path.basename(row.get("path") or "")) for row in rows)  # noqa: PTH119
        return sorted(content or name.encode("utf-8", "surrogatepass") for content, name in names)

    def _one(
        self, column: str | None, columns: Sequence[str], found: Sequence[str], what: str
    ) -> str:
        """The given column if it is one of `columns`; by default the only one of those found."""
        if column is not None and column not in columns:
            has = ", ".join(columns)
            raise UserError(f"{self.name} has no column {column!r} of {what}s: it has {has}")
        if column is None and len(found) != 1:
            raise UserError(
                f"{self.name} has {len(found)} columns of {what}s ({', '.join(found)}): "
                f"name one, as in {what}=COLUMN"
            )
        return column or found[0]

    def _read_labels(self, table: Any, column: str, *, required: bool) -> None:
        values = table.select_columns([column])[:][column]
        names = getattr(table.features[column], "names", None)
        # -1 stands for unknown, as in test sets with secret labels.
        if all(isinstance(value, (int, str)) and value not in (-1, "") for value in values):
            if names is None:
                names, values = number_classes([str(value) for value in values])
            self.classes, self.labels = list(names), values
        elif required:
            raise UserError(f"some rows of {self.name} have no class in {column}")


def _holds_bytes(column: str, kind: Any) -> bool:
    """Whether a column without the hub's metadata holds images, as in `ParquetImages`."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", "").endswith("binary") and column.lower() in IMAGE_COLUMNS


def _opened(datasets: Any, name: str, config: str | None, split: str | None) -> Any:
    """The rows of one split."""
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, split=split)
        if not isinstance(found, datasets.DatasetDict):
            return found
        split = split or ("train" if len(found) > 1 else next(iter(found)))
        if split not in found:
            raise ValueError(f"it has no split {split!r} but {', '.join(found)}")
        return found[split]
    except Exception as error:  # of this package, the network, or a reader of files
        reason = " ".join(str(error).split())
        raise UserError(f"hf:{name} cannot be opened: {reason}; write {FORM}") from error
