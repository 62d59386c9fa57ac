"""Which images make up which step: a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dino.data.views.random_streams import epoch_order
from dino.files import UserError


class EpochSampler:
    """Batches of (epoch, index) for the steps from `start_step` to `stop_step` (exclusive).

    Each epoch visits the data in another order, keyed by (seed, epoch). Step s of an epoch
    takes `order[s * batch : (s + 1) * batch]`, of which rank r takes the r-th contiguous part, so
    two ranks with half a batch each get exactly the images of one with the full batch. The last
    images of an epoch that do not fill a batch are left out of that epoch, as by the reference's
    loader.

    Args:
        length: number of images.
        batch: images per step over all ranks.
        seed: of the orders.
        rank: of this process.
        world: number of processes.
        start_step: first step, counted from the start of training; a resumed run passes its own.
        stop_step: step before which to end; None never ends.
        blocks: lengths of the runs of images that lie together, see
        `dino.data.views.random_streams.epoch_order`.

    Raises:
        UserError: if the data set is smaller than a batch, or ranks cannot share one equally.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        blocks: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if batch < 1 or batch % world != 0:
            raise UserError(
                f"the batch size {batch} cannot be shared by {world} processes: "
                f"choose a multiple of {world}"
            )
        if length < batch:
            raise UserError(
                f"the data set has {length} images, fewer than one batch of {batch}: "
                "choose a smaller batch size or add images"
            )
        total = length if blocks is None else sum(blocks)
        assert total == length, f"blocks of {total} images, not {length}"
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world = rank, world
        self.start_step, self.stop_step, self.blocks = start_step, stop_step, blocks

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's part of each step's batch."""
        share = self.batch // self.world
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.length, self.seed, epoch, self.blocks)
            for position in range(within, self.steps_per_epoch):
                if step == self.stop_step:
                    return
                first = position * self.batch + self.rank * share
                yield [(epoch, int(index)) for index in order[first : first + share]]
                step += 1


def spread(length: int, count: int) -> list[int]:
    """`count` indices, or all there are, evenly over `length` items."""
    count = min(length, count)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
