"""`dino select`: which images to label next, or to keep.

    diverse    each image is the one least similar to all selected before: the greedy k-center
               (Gonzalez 1985; Sener and Savarese 2018), at most twice as far as the best
    typical    images in the densest places: the most similar to their nearest neighbours
    outliers   images in the emptiest places
    balanced   the most typical images of as many clusters (Hacohen et al. 2022)

Near duplicates of selected images are left out. Similarity is the cosine of features.

Shapes: n images, m known images, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from dino.data.sources.open import open_source
from dino.features.command import TRAINED, Count, OptionalImages, Seed, number_table
from dino.features.contact_sheet import ImagesByPath, save_sheet
from dino.features.search import directions, nearest
from dino.features.table import FeatureTable
from dino.files import UserError, atomic_csv
from dino.jobs.cluster import cluster
from dino.jobs.command import IndexedJobSettings, job
from dino.runtime import ranks
from dino.settings import Range, validated

Method = Literal["diverse", "typical", "outliers", "balanced"]

NEIGHBOURS = 20
"""Nearest neighbours whose mean similarity is the density of an image (Hacohen et al.)."""

CLUSTERS = 500
"""Most clusters of `balanced` (Hacohen et al.)."""

DRAWS = 10
"""Random selections with which a selection is compared."""

SHEET, PER_ROW = 64, 8
"""Most images of the contact sheet, and images a row."""


class Selection:
    """Images selected one by one, and the similarity of every image to the most similar of them.

    Args:
        features: of length 1.
        known: features of length 1 of images that are there already.
    """

    def __init__(self, features: Float[Tensor, "n D"], known: Float[Tensor, "m D"]) -> None:
        self.features, self.chosen, self.similarity = features, list[int](), list[float]()
        self.nearest = torch.full((len(features),), -torch.inf)
        if len(known):
            self.nearest = nearest(features, known, 1)[0][:, 0].clone()  # is changed in place

    def add(self, image: int) -> None:
        """Select an image; `similarity` holds that to those before, -infinity for the first."""
        self.chosen.append(image)
        self.similarity.append(float(self.nearest[image]))
        torch.maximum(self.nearest, self.features @ self.features[image], out=self.nearest)
        self.nearest[image] = torch.inf

    def add_in_order(self, images: Iterable[int], count: int, apart: float) -> None:
        """Select the first images, up to `count` in all, that are no near duplicates."""
        for image in images:
            if len(self.chosen) == count:
                return
            if self.nearest[image] < apart:
                self.add(image)


def select(
    features: Float[Tensor, "n D"],
    method: Method,
    count: int,
    *,
    known: Float[Tensor, "m D"] | None = None,
    apart: float = 0.99,
    seed: int = 0,
) -> Selection:
    """Select images.

    Args:
        features: of length 1.
        method: see the module.
        count: how many; fewer are selected where all others are near duplicates.
        known: features of length 1 of images that are there already.
        apart: cosine similarity from which images are near duplicates.
        seed: of the clusters.
    """
    found = Selection(features, features[:0] if known is None else known)
    if method == "diverse":
        if known is None or not len(known):  # the image nearest to the mean of all
            found.add(int((features @ features.mean(dim=0)).argmax()))
        while len(found.chosen) < count and found.nearest.min() < apart:
            found.add(int(found.nearest.argmin()))
    elif method == "balanced":
        found.add_in_order(_by_cluster(features, count, seed), count, apart)
    else:
        order = density(features).argsort(descending=method == "typical", stable=True)
        found.add_in_order(order.tolist(), count, apart)
    return found


def density(features: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """The mean similarity of each image to its nearest neighbours; its time grows with n^2."""
    k = min(NEIGHBOURS, len(features) - 1)
    if k < 1:
        return torch.zeros(len(features))
    return nearest(features, features, k, skip=0)[0].mean(dim=1)


def _by_cluster(features: Float[Tensor, "n D"], count: int, seed: int) -> Iterator[int]:
    """The most typical image of each cluster, the largest cluster first, then the second, ..."""
    clusters = min(count, CLUSTERS, len(features))
    labels = cluster(features.numpy(), "kmeans", clusters, 2, seed)
    queues = []
    for number in range(labels.max() + 1):
        rows = torch.from_numpy(np.flatnonzero(labels == number))
        queues.append(rows[density(features[rows]).argsort(descending=True, stable=True)].tolist())
    for place in range(max(map(len, queues))):
        yield from (queue[place] for queue in queues if place < len(queue))


# ------------------------------------------------------------------------------------- measure
def accuracies(
    features: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    chosen: Sequence[int],
    sizes: Sequence[int],
) -> list[float]:
    """Top-1 accuracy in percent with which the first `sizes` images classify all others.

    Each other image gets the class of the most similar selected one.
    """
    found = []
    for size in sizes:
        bank = torch.tensor(chosen[:size])
        others = torch.ones(len(features), dtype=torch.bool)
        others[bank] = False
        index = nearest(features[others], features[bank], 1)[1][:, 0]
        right = labels[bank][index] == labels[others]
        found.append(100 * float(right.double().mean()))
    return found


def sizes_up_to(count: int) -> list[int]:
    """Up to six numbers, each twice the one before, of which `count` is the last."""
    return [size for size in (count >> shift for shift in range(5, -1, -1)) if size]


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Select(IndexedJobSettings):
    """Choose images: which to label next, or to keep."""

    examples: ClassVar[dict[str, str]] = {"out": "selected", "count": "100"}

    count: Count
    """How many images."""
    method: Method = "balanced"
    """balanced, the most typical images of as many clusters; diverse, each as unlike the others as
    possible; typical, in the densest places; or outliers, in the emptiest."""
    known: OptionalImages = None
    """Images that are labelled or kept already: nothing like them is selected."""
    apart: Annotated[float, Range(low=-1, high=1)] = 0.99
    """Cosine similarity from which images are near duplicates, of which one is selected."""
    seed: Seed = 0
    """Of the clusters, and of the random selections to compare with."""


def run(settings: Select) -> dict[str, Any]:
    """`dino select`: selected.csv in the order of selection, a sheet, select.json.

    Returns:
        The JSON's "select"; where images have classes, its "accuracy" by what selected them.

    Raises:
        UserError: for weights or images that cannot be used, or too few images.
    """
    settings = validated(settings)
    with job("select", settings, settings.data, settings.known) as started:
        source = open_source(settings.data, started.pixels)
        known = None if settings.known is None else open_source(settings.known, started.pixels)
        if settings.count >= len(source):
            raise UserError(f"{len(source):,} images leave no choice of {settings.count:,}")
        if source.labels is None and (settings.baseline or settings.compare):
            raise UserError("--baseline and --compare need images with classes: in sub-folders")
        tables: dict[str, FeatureTable] = {}
        found: dict[str, Selection] = {}
        for name, network in started.networks.items():
            tables[name] = settings.images(name, network, source)
            present = None
            if known is not None:
                present = _unit(settings.table(network, known, f"{name}, known"))
            if ranks().main:
                found[name] = select(
                    _unit(tables[name]),
                    settings.method,
                    settings.count,
                    known=present,
                    apart=settings.apart,
                    seed=settings.seed,
                )
        if not ranks().main:
            return {}
        own, images = found[TRAINED], tables[TRAINED]
        content: dict[str, Any] = {"images": len(images), "selected": len(own.chosen)}
        printed: list[Table | str] = []
        if images.labels is not None and source.labels is not None:
            content |= _measured(found, tables, settings)
            printed.append(_table(content, settings))
        line = f"{len(own.chosen):,} of {len(images):,} images selected"
        if len(own.chosen) < settings.count:
            line += f": all others are near duplicates of them (--apart {settings.apart:g})"
        files = _save(own, images, ImagesByPath(source), started.out, settings.method)
        started.report({"select": content}, *printed, line, files=files)
    return content


def _unit(table: FeatureTable) -> Float[Tensor, "n D"]:
    return directions(table.finite(), torch.device("cpu"))


def _measured(
    found: Mapping[str, Selection], tables: Mapping[str, FeatureTable], settings: Select
) -> dict[str, Any]:
    """Accuracies by number of labels; all are those of the first network's features."""
    images = tables[TRAINED]
    assert images.labels is not None
    features, sizes = _unit(images), sizes_up_to(min(len(one.chosen) for one in found.values()))
    place = {image: row for row, image in enumerate(images.indices)}
    scores = {}
    for name, one in found.items():
        chosen = [place[tables[name].indices[row]] for row in one.chosen]
        scores[name] = accuracies(features, images.labels, chosen, sizes)
    generator = np.random.default_rng(settings.seed)
    drawn = [generator.permutation(len(features))[: sizes[-1]].tolist() for _ in range(DRAWS)]
    random = np.array([accuracies(features, images.labels, one, sizes) for one in drawn])
    scores["random"] = random.mean(axis=0).tolist()
    return {"labels": sizes, "accuracy": scores, "random_deviation": random.std(axis=0).tolist()}


def _table(content: Mapping[str, Any], settings: Select) -> Table:
    rows = {n: [f"{value:.1f}" for value in of] for n, of in content["accuracy"].items()}
    deviation = content["random_deviation"]
    rows["random"] = [
        f"{cell} ± {one:.1f}" for cell, one in zip(rows["random"], deviation, strict=True)
    ]
    title = (
        f"{settings.method}: top-1 in % of all other images, by the nearest of so many labels\n"
        f"random: mean and deviation of {DRAWS} selections"
    )
    columns = ["selected by", *(f"{size:,}" for size in content["labels"])]
    return number_table(title, columns, rows)


def _save(
    found: Selection, table: FeatureTable, images: ImagesByPath, out: Path, method: str
) -> list[Path]:
    """The list of the selected images, and a sheet of the first."""
    listing, sheet = out / "selected.csv", out / "sheet.png"
    paths = [table.paths[row] for row in found.chosen]
    lines = (
        (rank, path, f"{value:.6f}" if np.isfinite(value) else "", images.class_name(path))
        for rank, (path, value) in enumerate(zip(paths, found.similarity, strict=True), start=1)
    )
    atomic_csv(listing, ("rank", "path", "similarity_to_earlier", "class"), lines)
    if not paths:
        return [listing]
    cells = [
        images.cell(path, f"{rank} {images.class_name(path)}".strip())
        for rank, path in enumerate(paths[:SHEET], start=1)
    ]
    rows = [cells[start : start + PER_ROW] for start in range(0, len(cells), PER_ROW)]
    title = f"{method}: the first {len(cells)} of {len(paths):,} selected images, in their order."
    save_sheet(sheet, rows, title)
    return [listing, sheet]
