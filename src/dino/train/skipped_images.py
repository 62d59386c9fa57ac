"""The images that a run could not use: counted by reason, listed in the run folder, limited."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dino.data.images.image_errors import ImageError, count_defects, read_list, write_list
from dino.files import UserError
from dino.runtime import Ranks, gather_objects


class SkippedImages:
    """The defect of each image that was skipped, over all ranks and all calls of a run.

    `RUN/skipped.csv` holds one line for each, sorted by path; there is none if nothing was skipped.

    Args:
        run: the run folder.
        images: number of images of the data set.
        share: of the images; if more than that have one and the same defect, the run stops.

    Raises:
        UserError: if `skipped.csv` holds something else.
    """

    def __init__(self, run: Path, images: int, share: float) -> None:
        self.path, self.images, self.share = run / "skipped.csv", images, share
        self._known: dict[str, tuple[str, str]] = {}  # path: defect, reason
        self._new: dict[str, tuple[str, str]] = {}  # of this rank, not shared yet
        if self.path.exists():
            try:
                self._known = read_list(self.path)
                if any(None in (name, *what) for name, what in self._known.items()):
                    raise KeyError("a line is too short")
            except (KeyError, csv.Error) as error:
                raise UserError(f"{self.path} is damaged ({error}): delete it") from None

    def __len__(self) -> int:
        """Number of different images."""
        return len(self._known)

    def add(self, errors: Iterable[ImageError]) -> None:
        """Add what this rank skipped in a batch."""
        for error in errors:
            if error.path not in self._known:
                self._new[error.path] = (error.defect, error.reason)

    def share_and_check(self, ranks: Ranks) -> None:
        """Exchange the new ones among all ranks and write the list; called by all at one step.

        Raises:
            UserError: if too many images have one and the same defect (on every rank).
        """
        before = len(self._known)
        for found in gather_objects(self._new):
            self._known.update(found)
        self._new = {}
        if len(self._known) > before and ranks.main:
            write_list(self.path, self._known)
        for defect, count in Counter(defect for defect, _ in self._known.values()).items():
            if count > self.share * self.images:
                path, (_, reason) = next(
                    item for item in sorted(self._known.items()) if item[1][0] == defect
                )
                raise UserError(
                    f"{count:,} of {self.images:,} images are {defect}, more than "
                    f"{self.share:.2%} (the first: {path}: {reason}): repair or remove those "
                    f"listed in {self.path}, or raise --execution.max-skipped"
                )

    def describe(self) -> str:
        """Such as "12 damaged, 3 missing", the most frequent first."""
        return count_defects(defect for defect, _ in self._known.values())
