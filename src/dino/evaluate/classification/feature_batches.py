"""Batches of features to train classifiers on: from tables, or from new crops in each epoch.

The order of an epoch, its crops and its flips depend on (seed, epoch, image) alone, and every rank
gets every full batch. The last batch of an epoch may be smaller; no image is left out.

Shapes: B images of a step, N numbers a feature, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dino.data.images.decode import as_pixels, crop_resize
from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source
from dino.data.views.photometric import normalize
from dino.data.views.random_streams import draw_views, epoch_order, generator
from dino.data.views.view_spec import ViewSpec
from dino.features.extractor import FeatureExtractor
from dino.features.table import (
    NO_ROWS,
    FeatureBatch,
    FeatureTable,
    Subset,
    joined,
    labels_of,
    my_shares,
    warn_skipped,
)
from dino.models.backbone import Backbone
from dino.runtime import Precision, autocast, gather_objects

TASK = "a linear classifier"

Step: TypeAlias = tuple[Float[Tensor, "B N"], Int[Tensor, " B"]]
"""Features and labels, on the device of the classifier."""


@dataclass(frozen=True)
class TableBatches:
    """Batches of features that were computed once. The length is the number of steps an epoch."""

    table: FeatureTable
    batch: int
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch, counted from 0."""
        labels = labels_of(self.table, TASK)
        order = torch.from_numpy(epoch_order(len(self.table), self.seed, epoch))
        for rows in order.split(self.batch):
            yield self.table.features[rows].to(self.device), labels[rows].to(self.device)


def crop_spec(size: int) -> ViewSpec:
    """The distribution of torchvision's `RandomResizedCrop`, and a flip with probability 1/2."""
    return ViewSpec(name="crop", count=1, size=size, scale=(0.08, 1.0))


class RandomCrops(Subset):
    """The random crops and flips of one epoch: a `Source` of images of S x S pixels.

    Resized bilinearly (paper, appendix F.2); random numbers are keyed by (seed, epoch, index).
    """

    def __init__(self, source: Source, size: int, seed: int, epoch: int) -> None:
        super().__init__(source, range(len(source)))
        self.seed, self.epoch, self.spec = seed, epoch, crop_spec(size)

    def __getitem__(self, index: int) -> UInt8[Tensor, "C S S"]:
        image = as_pixels(super().__getitem__(index))
        random = generator(self.seed, self.epoch, index)
        height, width = image.shape[1:]
        (view,) = draw_views([self.spec], height, width, random)
        return crop_resize(image, view.box, self.spec.size, view.flip, "bilinear")


@dataclass(frozen=True)
class CropBatches:
    """Batches of features of random crops, new in each epoch; the ranks share each step's images.

    The backbone is in evaluation mode, on the device of the steps. A step has `batch` images over
    all ranks; on each rank `forward_batch` images at a time pass through the network. The length
    is the number of steps of an epoch.
    """

    backbone: Backbone
    features: Callable[[Backbone, Float[Tensor, "B C S S"]], Float[Tensor, "B N"]]
    source: Source
    batch: int
    seed: int
    forward_batch: int = 64
    workers: int | None = 0
    precision: Precision = "fp32"

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch, counted from 0."""
        device, labels = next(self.backbone.parameters()).device, labels_of(self.source, TASK)
        order = epoch_order(len(self.source), self.seed, epoch)
        steps = np.split(order, range(self.batch, len(order), self.batch))
        shares = my_shares([step.tolist() for step in steps])
        crops = RandomCrops(self.source, self.backbone.preprocessing.crop, self.seed, epoch)
        extractor = FeatureExtractor(
            as_pixels,
            self._compute,
            self.forward_batch,
            self.workers,
            title=f"epoch {epoch + 1}",
            memory_option="--forward-batch",
        )
        skipped: list[ImageError] = []
        batches = extractor.batches(crops, list(chain.from_iterable(shares)))
        for step in by_step(batches, shares):
            indices, features, unusable = joined(gather_objects(step))
            skipped += unusable.values()
            if indices:
                yield features.to(device), labels[indices].to(device)
        warn_skipped(skipped, len(self.source))

    def _compute(self, images: Tensor) -> Float[Tensor, "B N"]:
        device, transform = next(self.backbone.parameters()).device, self.backbone.preprocessing
        with torch.inference_mode(), autocast(device, self.precision):
            images = images.to(device, non_blocking=True)
            return self.features(self.backbone, normalize(images, transform.mean, transform.std))


Batches: TypeAlias = TableBatches | CropBatches


def by_step(
    batches: Iterator[FeatureBatch], shares: Sequence[Sequence[int]]
) -> Iterator[FeatureBatch]:
    """Batches of any sizes, regrouped to the images of each share, in its order."""
    rows: dict[int, Tensor] = {}
    skipped: dict[int, ImageError] = {}
    for share in shares:
        while any(index not in rows and index not in skipped for index in share):
            batch = next(batches)
            rows |= zip(batch.indices, batch.features, strict=True)
            skipped |= batch.skipped
        usable = [index for index in share if index in rows]
        features = [rows.pop(index) for index in usable]
        yield FeatureBatch(
            usable,
            torch.stack(features) if features else NO_ROWS,
            {index: skipped.pop(index) for index in share if index in skipped},
        )
