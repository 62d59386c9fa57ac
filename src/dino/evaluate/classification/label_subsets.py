"""Subsets of labelled images: shares and shots drawn by class, and published lists.

The images drawn from a class depend on (seed, class) alone: smaller subsets of a seed lie within
larger ones.

Shapes: n images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dino.data.sources.open import Source
from dino.data.views.random_streams import generator
from dino.files import UserError


@dataclass(frozen=True)
class LabelSubset:
    """Some labelled images of a source.

    Attributes:
        name: such as "1 %", "5 shots" or the name of a list.
        seed: of the draw; None for a list and for all images.
        indices: of the images, ascending.
    """

    name: str
    seed: int | None
    indices: list[int]


def fraction(labels: Int[Tensor, " n"], share: float, seed: int) -> list[int]:
    """A share of each class, as in SimCLR's subsets: rounded, and at least one image.

    Raises:
        UserError: if `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"a fraction of the images must be above 0 and at most 1, not {share}")
    return sorted(
        index
        for members in _shuffled_classes(labels, seed)
        for index in members[: max(1, round(share * len(members)))]
    )


def shots(labels: Int[Tensor, " n"], count: int, seed: int) -> list[int]:
    """The same number of images of each class.

    Raises:
        UserError: if a class has fewer, or `count` is below 1.
    """
    if count < 1:
        raise UserError(f"a class needs at least 1 image, not {count}")
    classes = _shuffled_classes(labels, seed)
    if (fewest := min(map(len, classes))) < count:
        raise UserError(f"a class has only {fewest} images: choose less than {count} for --shots")
    return sorted(index for members in classes for index in members[:count])


def _shuffled_classes(labels: Int[Tensor, " n"], seed: int) -> list[list[int]]:
    """The images of each class, in a random order."""
    classes = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        order = generator(seed, 0, label).permutation(len(members))
        classes.append(members[torch.from_numpy(order)].tolist())
    return classes


def listed(source: Source, path: Path) -> list[int]:
    """The images that a list names, one a line, such as the published 1 % and 10 % of ImageNet.

    A line is a file name, with or without folders before it, and must be the end of exactly one
    image's path.

    Raises:
        UserError: if the list cannot be read, or a line names no image or several.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of images: {error}") from None
    by_name: dict[str, list[int]] = defaultdict(list)
    for index in range(len(source)):
        by_name[Path(source.path(index)).name].append(index)
    chosen: set[int] = set()
    for line in filter(None, lines):
        end = Path(line).parts
        same_name = by_name.get(Path(line).name, [])
        found = [i for i in same_name if Path(source.path(i)).parts[-len(end) :] == end]
        if len(found) != 1:
            raise UserError(f"{line} in {path} names {len(found) or 'none'} of the images, not one")
        chosen |= {*found}
    if not chosen:
        raise UserError(f"{path} names no image")
    return sorted(chosen)


def subsets(
    source: Source,
    labels: Int[Tensor, " n"],
    fractions: Sequence[float] = (),
    shot_counts: Sequence[int] = (),
    lists: Sequence[Path] = (),
    seeds: int = 1,
) -> list[LabelSubset]:
    """All requested subsets; those that are drawn, once for each of `seeds` seeds."""
    found: list[LabelSubset] = []
    for share in fractions:
        name = f"{100 * share:g} %"
        for seed in range(seeds) if share < 1 else (None,):
            found.append(LabelSubset(name, seed, fraction(labels, share, seed or 0)))
    for count in shot_counts:
        name = f"{count} shot" + "s" * (count > 1)
        found += [LabelSubset(name, seed, shots(labels, count, seed)) for seed in range(seeds)]
    found += [LabelSubset(path.name, None, listed(source, path)) for path in lists]
    return found
