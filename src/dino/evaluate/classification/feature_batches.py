"""Batches of features to train classifiers on: from a table, or from crops drawn anew each epoch.

The order of an epoch, its crops and its flips depend on (seed, epoch, image) alone, and every rank
gets every batch whole. The last batch of an epoch may be smaller; no image is left out.

Shapes: B images of a step, N numbers a feature, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dino.data.images.decode import as_pixels, crop_resize
from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source
from dino.data.views.photometric import normalize
from dino.data.views.view_spec import ViewSpec, draw_views, epoch_order, generator
from dino.evaluate.features.table import (
    FeatureTable,
    Pass,
    Rows,
    labels_of,
    place_among_ranks,
    share_of,
    tell_skipped,
)
from dino.models.backbone import Backbone
from dino.runtime import Precision, autocast, gather_objects

TASK = "a linear classifier"

Step: TypeAlias = tuple[Float[Tensor, "B N"], Int[Tensor, " B"]]
"""Features and labels, on the device of the classifier."""


@runtime_checkable
class Batches(Protocol):
    """What a classifier is trained on."""

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch, counted from 0."""
        ...

    def __len__(self) -> int:
        """Steps of an epoch."""
        ...


@dataclass(frozen=True)
class FromTables:
    """Features that were computed once.

    Attributes:
        tables: of the same images: one, or two of which each epoch takes either for each image.
        batch: images of a step.
        seed: of the orders and choices.
        device: where the steps go.
    """

    tables: Sequence[FeatureTable]
    batch: int
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.tables[0]) // self.batch)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """See `Batches`."""
        count, labels = len(self.tables[0]), labels_of(self.tables[0], TASK)
        order = torch.from_numpy(epoch_order(count, self.seed, epoch))
        # Which of the tables, drawn for all images at once: those of "image" 0 of this epoch.
        chosen = generator(self.seed, epoch, 0).integers(len(self.tables), size=count)
        for part in order.split(self.batch):
            features = self.tables[0].features[part]
            other = torch.from_numpy(chosen)[part] == 1
            if other.any():
                features[other] = self.tables[1].features[part[other]]
            yield features.to(self.device), labels[part].to(self.device)


def crop_spec(size: int) -> ViewSpec:
    """The law of torchvision's `RandomResizedCrop`, and a flip of one half."""
    return ViewSpec(name="crop", count=1, size=size, scale=(0.08, 1.0))


class RandomCrops(Source):
    """The random crops and flips of one epoch: a `Source` of pictures of S x S pixels.

    Resized bilinearly (paper, appendix F.2); the numbers are keyed by (seed, epoch, index).
    """

    def __init__(self, source: Source, size: int, seed: int, epoch: int) -> None:
        self.source, self.seed, self.epoch = source, seed, epoch
        self.labels, self.classes = source.labels, source.classes
        self.spec = crop_spec(size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> UInt8[Tensor, "C S S"]:
        image = as_pixels(self.source[index])
        random = generator(self.seed, self.epoch, index)
        height, width = image.shape[1:]
        (view,) = draw_views([self.spec], height, width, random)
        return crop_resize(image, view.box, self.spec.size, view.flip, "bilinear")

    def path(self, index: int) -> str:
        """Where image `index` lies, for messages."""
        return self.source.path(index)


@dataclass(frozen=True)
class FromCrops:
    """Features of random crops, computed anew in each epoch; the ranks share each step's images.

    Attributes:
        backbone: the network, in evaluation mode, on the device of the steps.
        features: which ones, from the network and a batch.
        source: labelled images.
        batch: images of a step over all ranks.
        seed: of the orders and crops.
        forward: images at a time through the network, on each rank.
        workers: processes that read images, on each rank.
        precision: of the network.
    """

    backbone: Backbone
    features: Callable[[Backbone, Float[Tensor, "B C S S"]], Float[Tensor, "B N"]]
    source: Source
    batch: int
    seed: int
    forward: int = 64
    workers: int = 0
    precision: Precision = "fp32"

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """See `Batches`."""
        device, labels = next(self.backbone.parameters()).device, labels_of(self.source, TASK)
        order = epoch_order(len(self.source), self.seed, epoch)
        steps = np.split(order, range(self.batch, len(order), self.batch))
        here = place_among_ranks()
        shares = [share_of(step.tolist(), *here) for step in steps]
        crops = RandomCrops(self.source, self.backbone.preprocessing.crop, self.seed, epoch)
        run = Pass(as_pixels, self._compute, self.forward, self.workers, title=f"epoch {epoch + 1}")
        skipped: list[ImageError] = []
        for mine in by_step(run.over(crops, list(chain.from_iterable(shares))), shares):
            every = gather_objects((mine.indices, mine.features.numpy(), [*mine.skipped.values()]))
            skipped += chain.from_iterable(errors for _, _, errors in every)
            indices = list(chain.from_iterable(indices for indices, _, _ in every))
            if indices:
                rows = [torch.from_numpy(rows) for found, rows, _ in every if found]
                yield torch.cat(rows).to(device), labels[indices].to(device)
        tell_skipped(skipped, len(self.source))

    def _compute(self, images: Tensor) -> Float[Tensor, "B N"]:
        device, how = next(self.backbone.parameters()).device, self.backbone.preprocessing
        with torch.inference_mode(), autocast(device, self.precision):
            pixels = normalize(images.to(device, non_blocking=True), how.mean, how.std)
            return self.features(self.backbone, pixels)


def by_step(stream: Iterator[Rows], shares: Sequence[Sequence[int]]) -> Iterator[Rows]:
    """Rows that come in any portions, put together to those of each share, in its order."""
    rows: dict[int, Tensor] = {}
    skipped: dict[int, ImageError] = {}
    for share in shares:
        while any(index not in rows and index not in skipped for index in share):
            portion = next(stream)
            rows |= zip(portion.indices, portion.features, strict=True)
            skipped |= portion.skipped
        usable = [index for index in share if index in rows]
        features = [rows.pop(index) for index in usable]
        yield Rows(
            usable,
            torch.stack(features) if features else torch.empty(0, 0),
            {index: skipped.pop(index) for index in share if index in skipped},
        )
