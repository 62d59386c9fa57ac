"""Rows of numbers for images: which image each belongs to, and the pass that computes them.

Shapes: n images, B batch, C channels, H W pixels, N numbers an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from PIL import Image
from rich.console import Console
from torch import Tensor

from dino.data.images.image_errors import ImageError, count_defects
from dino.data.loader import evaluation_loader
from dino.data.sources.open import Source
from dino.files import UserError
from dino.progress import bar
from dino.runtime import gather_objects, ranks


@dataclass(frozen=True)
class FeatureTable:
    """Features of the images of one source, in its order.

    Attributes:
        features: float32, on the CPU; large tables of a store are mapped from its file.
        labels: one class a row, an index into `classes`; None for unlabelled images.
        paths: where each image came from.
        classes: names of the classes, if they have any.
        skipped: the images that could not be used and have no row.
        indices: of each row's image in the source; empty where there is no source.
    """

    features: Float[Tensor, "n N"]
    labels: Int[Tensor, " n"] | None
    paths: list[str]
    classes: list[str] | None
    skipped: list[ImageError] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def checked(self, needs_all: str | None = None) -> Float[Tensor, "n N"]:
        """The features, if they are finite.

        Args:
            needs_all: name of a benchmark for which every image must have a row.

        Raises:
            UserError: for features that are not finite, or an image that is needed but left out.
        """
        if needs_all is not None and self.skipped:
            raise UserError(f"{needs_all} needs every one of its images, but {self.skipped[0]}")
        if len(self) and not torch.stack(self.features.aminmax()).isfinite().all():
            raise UserError("the features hold NaN or infinity: the network has diverged")
        return self.features


class Part(Source):
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
        """Where image `index` of this part lies, for messages."""
        return self.source.path(self.indices[index])


class Rows(NamedTuple):
    """What a batch of images gave.

    Attributes:
        indices: of each row's image in the source.
        features: the rows, float32 on the CPU.
        skipped: the images of the batch that cannot be used, by index.
    """

    indices: list[int]
    features: Float[Tensor, "B N"]
    skipped: dict[int, ImageError]


@dataclass(frozen=True)
class Pass:
    """How rows are computed: the transform of an image, the function of a batch, and the reading.

    Attributes:
        transform: from a picture to what `compute` takes.
        compute: from a batch to its rows.
        batch: images at a time; 1 for images that keep different sizes.
        workers: processes that read images.
        progress: show a bar on a terminal.
        title: what the bar says.
    """

    transform: Callable[[Any], Num[Tensor, "C H W"]]
    compute: Callable[[Num[Tensor, "B C H W"]], Float[Tensor, "B N"]]
    batch: int = 64
    workers: int = 0
    progress: bool = True
    title: str = "features"

    def over(self, source: Source, indices: Sequence[int]) -> Iterator[Rows]:
        """The rows of some images of a source, batch by batch, in the given order."""
        part, seen = Part(source, indices), 0
        with bar(self.title, len(part), shown=self.progress and ranks().main) as advance:
            for whole in evaluation_loader(part, self.transform, self.batch, self.workers):
                usable = whole.index.tolist()
                asked = range(seen, seen + len(usable) + len(whole.skipped))
                unusable = sorted({*asked} - {*usable})
                yield Rows(
                    [indices[position] for position in usable],
                    self.compute(whole.images).float().cpu() if usable else torch.empty(0, 0),
                    {indices[p]: e for p, e in zip(unusable, whole.skipped, strict=True)},
                )
                seen = asked.stop
                advance(len(asked))


def in_memory(source: Source, run: Pass) -> FeatureTable:
    """All rows of a source. Ranks compute contiguous shares, and each gets the whole table.

    Raises:
        UserError: if no image at all can be used.
    """
    share = my_share(range(len(source)))
    rows: Tensor | None = None
    kept: list[int] = []
    skipped: dict[int, ImageError] = {}
    for indices, found, unusable in run.over(source, share):
        skipped |= unusable
        if not indices:
            continue
        if rows is None:  # the whole share at once, so that nothing is held twice
            rows = torch.empty(len(share), found.shape[1])
        rows[len(kept) : len(kept) + len(found)] = found
        kept += indices
    mine = None if rows is None else rows[: len(kept)]
    shares, all_kept, all_skipped = zip(*gather_objects((mine, kept, skipped)), strict=True)
    tensors = [part for part in shares if part is not None]
    unusable = {index: error for part in all_skipped for index, error in part.items()}
    used = [index for part in all_kept for index in part]
    check_usable(source, unusable)
    return table_of(source, tensors[0] if len(tensors) == 1 else torch.cat(tensors), used, unusable)


def my_share(indices: Sequence[int]) -> Sequence[int]:
    """This rank's contiguous part of `indices`; unequal where they do not divide."""
    return share_of(indices, *place_among_ranks())


def place_among_ranks() -> tuple[int, int]:
    """This rank's place among those who share the work, and their number.

    These are the ranks that answer: without a process group this process alone.
    """
    members = gather_objects(ranks().rank)
    return members.index(ranks().rank), len(members)


def share_of(indices: Sequence[int], place: int, world: int) -> Sequence[int]:
    """The contiguous part of `indices` for one place of `world`."""
    count = len(indices)
    return indices[count * place // world : count * (place + 1) // world]


def table_of(
    source: Source,
    features: Float[Tensor, "n N"],
    used: Sequence[int],
    skipped: dict[int, ImageError],
) -> FeatureTable:
    """The table whose rows are images `used` of `source`; stderr is told of the others."""
    errors = [error for _, error in sorted(skipped.items())]
    tell_skipped(errors, len(source))
    return FeatureTable(
        features=features,
        labels=None if source.labels is None else torch.tensor([source.labels[i] for i in used]),
        paths=[source.path(index) for index in used],
        classes=source.classes,
        skipped=errors,
        indices=list(used),
    )


def labels_of(images: FeatureTable | Source, task: str) -> Int[Tensor, " n"]:
    """The labels of images that must have them.

    Raises:
        UserError: if they have none, naming the `task` that needs them.
    """
    if images.labels is None:
        raise UserError(
            f"{task} needs classes: put the images of each class into a sub-folder of its own"
        )
    return torch.as_tensor(images.labels)


def matched_labels(
    images: FeatureTable | Source, classes: Sequence[str] | None, task: str
) -> Int[Tensor, " n"]:
    """The labels of `images` in the numbers of `classes`; classes it lacks get numbers beyond.

    Where one side has no names the numbers themselves count.
    """
    labels = labels_of(images, task)
    if classes is None or images.classes is None:
        return labels
    missing = [name for name in images.classes if name not in classes]
    numbers = {name: number for number, name in enumerate([*classes, *missing])}
    return torch.tensor([numbers[name] for name in images.classes])[labels]


def check_usable(source: Source, skipped: dict[int, ImageError]) -> None:
    """Refuse a source of which nothing is left.

    Raises:
        UserError: naming the first image and what is wrong with it.
    """
    if len(skipped) == len(source):
        raise UserError(
            f"none of the {len(source):,} images can be used, "
            f"the first because {skipped[min(skipped)]}"
        )


def tell_skipped(skipped: Sequence[ImageError], count: int) -> None:
    """Tell the user once of the images, of `count`, that could not be used."""
    if skipped and ranks().main:
        _tell_once(
            f"{len(skipped):,} of {count:,} images could not be used and were left out "
            f"({count_defects(error.defect for error in skipped)}), the first: {skipped[0]}"
        )


@lru_cache(maxsize=1024)
def _tell_once(text: str) -> None:
    """Say it on stderr; a network is measured many times on the same images."""
    Console(stderr=True).print(text, style="yellow", highlight=False, soft_wrap=True)
