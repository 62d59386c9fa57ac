"""Feature extraction: each image exactly once, in order, also over several ranks.

Shapes: n images, B batch, C channels, H W pixels, N numbers an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor

from dino.data.images.image_errors import ImageError
from dino.data.loader import evaluation_loader
from dino.data.sources.open import Source
from dino.features.cache import cached_table
from dino.features.table import (
    NO_ROWS,
    FeatureBatch,
    FeatureTable,
    Subset,
    check_usable,
    joined,
    my_share,
    table_of,
)
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import Precision, autocast, gather_objects, memory_errors, ranks


@dataclass(frozen=True)
class Descriptor:
    """A feature of an image: a transform, and a function of the network.

    Attributes:
        name: such as "cls", "cls4", "cls+gem".
        transform: from a picture to the network's input: a frozen dataclass, whose repr holds every
            parameter.
        compute: from the network, in evaluation mode, and a batch to one row an image.
        settings: everything else that changes the numbers, as JSON takes it.
    """

    name: str
    transform: Callable[[Image.Image], Float[Tensor, "C H W"]]
    compute: Callable[[Backbone, Float[Tensor, "B C H W"]], Float[Tensor, "B N"]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes one row of numbers for each image.

    `batch` is 1 for images of different sizes. `title` is that of the progress bar, `memory_option`
    the option to lower where memory does not suffice.
    """

    transform: Callable[[Any], Num[Tensor, "C H W"]]
    compute: Callable[[Num[Tensor, "B C H W"]], Float[Tensor, "B N"]]
    batch: int = 64
    workers: int | None = 0
    title: str = "features"
    memory_option: str = "--batch"

    def batches(self, source: Source, indices: Sequence[int]) -> Iterator[FeatureBatch]:
        """Features of some images of a source, batch by batch, in the given order.

        Raises:
            UserError: if a batch does not fit into memory.
        """
        subset, start = Subset(source, indices), 0
        with bar(self.title, len(subset), shown=ranks().main) as advance:
            for batch in evaluation_loader(subset, self.transform, self.batch, self.workers):
                usable = batch.index.tolist()
                requested = range(start, start + len(usable) + len(batch.skipped))
                unusable = sorted({*requested} - {*usable})
                with memory_errors(self.memory_option):
                    rows = self.compute(batch.images).float().cpu() if usable else NO_ROWS
                yield FeatureBatch(
                    [indices[position] for position in usable],
                    rows,
                    {indices[p]: e for p, e in zip(unusable, batch.skipped, strict=True)},
                )
                start = requested.stop
                advance(len(requested))

    def table(self, source: Source) -> FeatureTable:
        """Features of all images. Ranks compute contiguous shares; each gets the full table.

        Raises:
            UserError: if no image can be used.
        """
        share = my_share(range(len(source)))
        rows = NO_ROWS
        used: list[int] = []
        skipped: dict[int, ImageError] = {}
        for indices, features, unusable in self.batches(source, share):
            skipped |= unusable
            if not indices:
                continue
            if not used:  # the full share at once, so that no row is held twice
                rows = torch.empty(len(share), features.shape[1])
            rows[len(used) : len(used) + len(indices)] = features
            used += indices
        complete = joined(gather_objects(FeatureBatch(used, rows[: len(used)], skipped)))
        check_usable(source, complete.skipped)
        return table_of(source, complete)


def extract(
    backbone: Backbone,
    source: Source,
    descriptor: Descriptor | None = None,
    *,
    store: Path | None = None,
    precision: Precision = "fp32",
    **options: Any,
) -> FeatureTable:
    """Features of every image of `source`, in its order.

    Images that cannot be used have no row; the table lists them, and a warning counts them. In a
    process group the ranks share the images, and all get the full table. The backbone is used in
    evaluation mode, on the device where it is, and left as it was.

    By default the descriptor is the feature of the paper: the final-norm CLS token, or the pooled
    feature, through the transform of the weights. bf16 features agree with those of fp32 to about
    two digits. `**options` are those of `FeatureExtractor`; none changes the result.

    A table that is found in the folder `store` is opened, an unfinished one continued. Only images
    that are files are cached, since changes of others cannot be noticed.

    Raises:
        UserError: if no image can be used, or a batch does not fit into memory.
    """
    device = next(backbone.parameters()).device
    what = descriptor or Descriptor("cls", backbone.preprocessing, lambda module, x: module(x))

    def compute(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        with torch.inference_mode(), autocast(device, precision):
            return what.compute(backbone, images.to(device, non_blocking=True))

    extractor = FeatureExtractor(what.transform, compute, **options)
    training = backbone.training
    backbone.eval()
    try:
        if store is not None:
            transform = repr(what.transform)
            if " at 0x" in transform:
                raise ValueError(f"{transform} hides its parameters: make it a frozen dataclass")
            key = {"descriptor": what.name, "settings": what.settings, "transform": transform}
            key["precision"] = precision
            batches = partial(extractor.batches, source)
            table = cached_table(store, backbone, source, key, batches)
            if table is not None:
                return table
        return extractor.table(source)
    finally:
        backbone.train(training)
