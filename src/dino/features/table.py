"""Features of the images of one source as a table, and subsets of sources.

Shapes: n images, B batch, N numbers an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dino.data.images.image_errors import ImageError, left_out
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.base import Source, warn
from dino.data.sources.open import open_source
from dino.files import UserError
from dino.runtime import gather_objects, ranks


@dataclass(frozen=True)
class FeatureTable:
    """Features of the images of one source, in its order.

    Attributes:
        features: float32, on the CPU; large cached tables are mapped from their file.
        labels: one class a row, an index into `classes`; None for unlabelled images.
        paths: where each image came from.
        classes: names of the classes, if they have any.
        skipped: the images that could not be used and have no row.
        indices: of each row's image in the source.
    """

    features: Float[Tensor, "n N"]
    labels: Int[Tensor, " n"] | None
    paths: list[str]
    classes: list[str] | None
    skipped: list[ImageError] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def finite(self, complete_for: str | None = None) -> Float[Tensor, "n N"]:
        """The features.

        Raises:
            UserError: if a feature is not finite, or an image of the benchmark `complete_for` has
                no row.
        """
        if complete_for is not None and self.skipped:
            raise UserError(f"{complete_for} needs every one of its images, but {self.skipped[0]}")
        check_finite(self.features)
        return self.features


def check_finite(features: Float[Tensor, "n N"]) -> None:
    """Raise a `UserError` if a feature is NaN or infinite."""
    if len(features) and not torch.stack(features.aminmax()).isfinite().all():
        raise UserError("the features hold NaN or infinity: the network has diverged")


class Subset(Source):
    """Some images of a source, in the given order: itself a `Source`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        self.labels = None if source.labels is None else [source.labels[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image | Tensor:
        return self.source[self.indices[index]]

    def path(self, index: int) -> str:
        """See `Source.path`."""
        return self.source.path(self.indices[index])


class FeatureBatch(NamedTuple):
    """Features of a batch of images.

    Attributes:
        indices: of each row's image in the source.
        features: the rows, float32 on the CPU.
        skipped: the images of the batch that cannot be used, by index.
    """

    indices: list[int]
    features: Float[Tensor, "B N"]
    skipped: dict[int, ImageError]


NO_ROWS = torch.empty(0, 0)


def joined(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    """Several batches as one."""
    rows = [batch.features for batch in batches if batch.indices]
    return FeatureBatch(
        [index for batch in batches for index in batch.indices],
        torch.cat(rows) if len(rows) > 1 else next(iter(rows), NO_ROWS),  # cat copies even one
        {index: error for batch in batches for index, error in batch.skipped.items()},
    )


def table_of(source: Source, batch: FeatureBatch) -> FeatureTable:
    """The table of all images of a source; warns about those without a row on stderr."""
    errors = [error for _, error in sorted(batch.skipped.items())]
    warn_skipped(errors, len(source))
    labels = source.labels
    return FeatureTable(
        features=batch.features,
        labels=None if labels is None else torch.tensor([labels[i] for i in batch.indices]),
        paths=[source.path(index) for index in batch.indices],
        classes=source.classes,
        skipped=errors,
        indices=batch.indices,
    )


# ------------------------------------------------------------------------------------- ranks
def my_share(indices: Sequence[int]) -> Sequence[int]:
    """This rank's contiguous share of `indices`; unequal where they do not divide."""
    return my_shares([indices])[0]


def my_shares(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """`my_share` of each sequence. Without a process group, a process has all of each."""
    members = gather_objects(ranks().rank)
    rank, world = members.index(ranks().rank), len(members)
    return [s[len(s) * rank // world : len(s) * (rank + 1) // world] for s in sequences]


# ------------------------------------------------------------------------------------- labels
def labels_of(images: FeatureTable | Source, task: str) -> Int[Tensor, " n"]:
    """The labels of images that must have them.

    Raises:
        UserError: if they have none, naming the `task` that needs them.
    """
    if images.labels is None:
        raise UserError(
            f"{task} needs classes: put the images of each class into a separate sub-folder"
        )
    return torch.as_tensor(images.labels)


def count_classes(images: FeatureTable | Source, task: str) -> int:
    """How many classes images have: names, or numbers up to the largest."""
    return len(images.classes) if images.classes else int(labels_of(images, task).max()) + 1


def labels_in(
    classes: Sequence[str] | None, images: FeatureTable | Source, task: str
) -> Int[Tensor, " n"]:
    """The labels of `images` as indices into `classes`; unknown classes get indices beyond.

    Where one side has no names the numbers are compared.
    """
    labels = labels_of(images, task)
    if classes is None or images.classes is None:
        return labels
    missing = [name for name in images.classes if name not in classes]
    numbers = {name: number for number, name in enumerate([*classes, *missing])}
    return torch.tensor([numbers[name] for name in images.classes])[labels]


def of_known_classes(
    images: Source, classes: Sequence[str] | None, known: Sequence[int], task: str
) -> Source:
    """The images whose class can be predicted; warns about the others, which are left out.

    `classes` are the names that the labelled training images, bank or classifier have, `known` the
    labels that occur there.

    Raises:
        UserError: if no class occurs on both sides.
    """
    usable = torch.isin(labels_in(classes, images, task), torch.tensor(known))
    if usable.all():
        return images
    number = int(labels_of(images, task)[~usable][0])
    name = images.classes[number] if images.classes else f"class {number}"
    if not usable.any():
        raise UserError(
            f"{task} cannot classify these images: none of their classes, such as {name}, is "
            "among those to choose from. Name the classes alike on both sides"
        )
    warn_once(
        f"{(~usable).sum():,} of {len(images):,} images to classify were left out: their "
        f"classes, such as {name}, are not among those to choose from"
    )
    return Subset(images, usable.nonzero().squeeze(1).tolist())


def open_labelled(
    data: str, val: str, pixels: PixelFormat, task: str
) -> tuple[Source, Source, dict[str, Any]]:
    """Labelled images to train on, test images of their classes, and counts for JSON.

    The counts are the test images "left_out" for their class, and "ignored_files".

    Raises:
        UserError: if images do not exist, have no labels, or no class occurs in both.
    """
    source, test = open_source(data, pixels), open_source(val, pixels)
    known = labels_of(source, task).tolist()
    usable = of_known_classes(test, source.classes, known, task)
    left_out = len(test) - len(usable)
    counts = {"left_out": left_out, "ignored_files": ignored_files(source, test)}
    return source, usable, counts


def ignored_files(*sources: Source | None) -> dict[str, int]:
    """How many files of the sources are no images, by their ending."""
    counts = (Counter(source.left_out) for source in sources if source is not None)
    return dict(sum(counts, Counter()))


# ------------------------------------------------------------------------------------- warnings
class NoUsableImage(UserError):
    """None of the images of a source can be used; `skipped` has the reason for each, in order."""

    def __init__(self, message: str, skipped: Sequence[ImageError] = ()) -> None:
        super().__init__(message)
        self.skipped = skipped


def check_usable(source: Source, skipped: dict[int, ImageError]) -> None:
    """Raise `NoUsableImage` that names the first image and its defect if none can be used."""
    if len(skipped) == len(source):
        raise NoUsableImage(
            f"none of the {len(source):,} images can be used, "
            f"the first because {skipped[min(skipped)]}",
            [error for _, error in sorted(skipped.items())],
        )


def warn_skipped(skipped: Sequence[ImageError], count: int) -> None:
    """Warn once about the images, of `count`, that could not be used."""
    if skipped:
        warn_once(left_out(skipped, count))


warn_once = lru_cache(maxsize=1024)(warn)
"""Print a warning on stderr, once in a process: an evaluation may run many times."""
