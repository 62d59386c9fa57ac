"""What can be wrong with an image, in kinds that can be counted."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from dino.files import UserError, atomic_csv, csv_text

Defect = Literal["missing", "unreadable", "empty", "not an image", "damaged", "too large", "misfit"]
"""Why an image cannot be used (`ImageError.reason` has the details).

Missing: no such file. Unreadable: the system refuses. Empty: no bytes. Not an image: bytes in no
known format. Damaged: truncated or corrupt. Too large: a decompression bomb. Misfit: pixels that
do not fit the network, or that need an extra.
"""


class ImageError(UserError):
    """An image that cannot be used.

    Attributes:
        path: of the image.
        reason: what is wrong with it, in a few words.
        defect: which kind of wrong.
    """

    def __init__(self, path: str, reason: str, defect: Defect = "damaged") -> None:
        super().__init__(path, reason, defect)  # all arguments, so that it survives pickling
        self.path, self.reason = path, reason
        self.defect: Defect = defect

    def __str__(self) -> str:
        """One sentence naming the file."""
        return f"{self.path} cannot be read as an image: {self.reason}"


def missing_extra(path: str, what: str, extra: str) -> ImageError:
    """The error of an image for which an optional package is not installed."""
    return ImageError(path, f"{what}: pip install 'dino-ssl[{extra}]'", "misfit")


def count_each(defects: Iterable[str]) -> dict[str, int]:
    """How many there are of each defect, the most frequent first, equal counts by name."""
    return dict(Counter(sorted(defects)).most_common())


def count_defects(defects: Iterable[str]) -> str:
    """Such as "12 damaged, 3 missing"; see `count_each`."""
    return ", ".join(f"{count:,} {defect}" for defect, count in count_each(defects).items())


def left_out(skipped: Sequence[ImageError], count: int) -> str:
    """The sentence about the images, of `count`, that could not be used; `skipped` holds some."""
    return (
        f"{len(skipped):,} of {count:,} images could not be used and were left out "
        f"({count_defects(error.defect for error in skipped)}), the first: {skipped[0]}"
    )


def write_list(path: Path, found: Mapping[str, tuple[str, str]]) -> None:
    """Write a CSV of images that cannot be used (path: defect and reason), sorted, atomically."""
    rows = ((name, *what) for name, what in sorted(found.items()))
    atomic_csv(path, ("path", "defect", "reason"), rows)


def read_list(path: Path) -> dict[str, tuple[str, str]]:
    """What `write_list` wrote."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {
            csv_text(line["path"]): (line["defect"], csv_text(line["reason"]))
            for line in csv.DictReader(file)
        }
