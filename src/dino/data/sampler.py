"""Which images make up which step: a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from dino.data.views.random_streams import epoch_order
from dino.files import UserError


@dataclass(eq=False)
class EpochSampler:
    """Batches of (epoch, index) for the steps from `start_step` to `stop_step` (exclusive).

    Each epoch visits the data in another order, keyed by (seed, epoch). Step s of an epoch
    takes `order[s * batch : (s + 1) * batch]`, of which rank r takes the r-th contiguous share, so
    two ranks with half a batch each get exactly the images of one with the full batch. The last
    images of an epoch that do not fill a batch are left out of that epoch, as by the reference's
    loader.

    Attributes:
        length: number of images.
        batch: images per step over all ranks.
        start_step: first step, counted from the start of training; a resumed run begins later.
        stop_step: step before which to end; None never ends.
        blocks: as for `dino.data.views.random_streams.epoch_order`.

    Raises:
        UserError: if the data set is smaller than a batch, or ranks cannot share one equally.
    """

    length: int
    batch: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    start_step: int = 0
    stop_step: int | None = None
    blocks: Sequence[int] | np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse a batch that cannot be made."""
        if self.batch < 1 or self.batch % self.world != 0:
            raise UserError(
                f"the batch size {self.batch} cannot be shared by {self.world} processes: "
                f"choose a multiple of {self.world}"
            )
        if self.length < self.batch:
            raise UserError(
                f"the data set has {self.length} images, fewer than one batch of {self.batch}: "
                f"set --batch {self.length} or less, or add images"
            )
        total = self.length if self.blocks is None else sum(self.blocks)
        assert total == self.length, f"blocks of {total} images, not {self.length}"

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's share of each step's batch."""
        share = self.batch // self.world
        for step in islice(count(), self.start_step, self.stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == self.start_step:
                order = epoch_order(self.length, self.seed, epoch, self.blocks)
            first = position * self.batch + self.rank * share
            yield [(epoch, int(index)) for index in order[first : first + share]]


def spread(length: int, count: int) -> list[int]:
    """`count` indices, or all there are, evenly over `length` items."""
    count = min(length, count)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
