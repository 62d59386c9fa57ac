"""Image retrieval: the images of a database that show the same thing (section 4.2.1, Table 3).

Measured on Revisited Oxford and Paris (Radenovic et al. 2018) and folders laid out like them; or,
without ground truth, the neighbours of a user's images as a list and a contact sheet.

Shapes: q queries, n images of the database, B batch, C channels, H W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dino.data.images.contact_sheet import Cell
from dino.data.images.decode import to_rgb, to_tensor
from dino.data.sources.open import Source, open_source
from dino.data.views.photometric import normalize
from dino.evaluate import command
from dino.evaluate.contact_sheet import ImagesByPath, save_sheet
from dino.evaluate.features.extractor import Descriptor, extract
from dino.evaluate.features.search import nearest
from dino.evaluate.retrieval.ranking_metrics import Precisions, positions, rankings, summarize
from dino.evaluate.retrieval.revisited import GroundTruth, ground_truths, open_benchmark
from dino.files import UserError, atomic_csv
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group

Scales = Literal["single", "multi"]

SCALES: dict[Scales, tuple[float, ...]] = {"single": (1.0,), "multi": (1.0, 2**-0.5, 0.5)}
"""Sizes of the network's input, relative to `--size`."""

PAPER: dict[str, tuple[int, Scales]] = {"oxford": (224, "single"), "paris": (512, "multi")}
"""Longer side and scales of the published numbers, by a word in the name of the data set."""

PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Positives, and images left out of the ranking, of each protocol."""

SHEET = (12, 8)
"""Most queries, and neighbours of each, on a contact sheet."""


# -------------------------------------------------------------------------------- the feature
@dataclass(frozen=True)
class MaxSideResize:
    """A transform that keeps the aspect ratio: the longer side is at most `size`; never enlarged.

    Only a side below `least`, which holds no patch of the network, is stretched to it. Pillow's
    Lanczos filter, as in the published code.
    """

    size: int
    least: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Float[Tensor, "C H W"]:
        """Turn an image into the network's input."""
        small = to_rgb(image).copy()
        small.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        if min(small.size) < self.least:
            width, height = (max(side, self.least) for side in small.size)
            small = small.resize((width, height), Image.Resampling.LANCZOS)
        return normalize(to_tensor(small), self.mean, self.std)


def multiscale(
    backbone: Backbone, images: Float[Tensor, "B C H W"], scales: Sequence[float]
) -> Float[Tensor, "B D"]:
    """The mean feature over several scales, of length 1 unless the only scale is 1.

    The normalised pixels are resized bilinearly, without antialiasing. The published code divides
    by the norm of the batch, which is the same for its batches of one.
    """
    if tuple(scales) == (1.0,):
        return backbone(images)
    total = torch.stack([backbone(_resized(images, scale)) for scale in scales]).mean(dim=0)
    return F.normalize(total, dim=1)


def _resized(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def descriptor(backbone: Backbone, size: int, scales: Scales = "single") -> Descriptor:
    """The feature of the paper (CLS token, or pooled) of images of at most `size` pixels a side."""
    factors, preprocessing = SCALES[scales], backbone.preprocessing
    least = -int(-(backbone.patch_size or 32) // min(factors))  # rounded up
    transform = MaxSideResize(size, least, preprocessing.mean, preprocessing.std)
    compute = partial(multiscale, scales=factors)
    return Descriptor(f"retrieval-{scales}", transform, compute, {"scales": list(factors)})


# ------------------------------------------------------------------------------ the benchmark
def precisions(
    queries: Float[Tensor, "q D"],
    database: Float[Tensor, "n D"],
    truth: Sequence[GroundTruth],
    device: torch.device | str | None = None,
) -> dict[str, Precisions]:
    """Mean average precision and mP@k of features, for "easy", "medium" and "hard"."""
    return judge(rankings(queries, database, device=device), truth)


def judge(
    ranked: Iterable[Int[np.ndarray, " n"]], truth: Sequence[GroundTruth]
) -> dict[str, Precisions]:
    """See `precisions`; from rankings of the database, best first, one for each query."""
    found: dict[str, list[list[int]]] = {protocol: [] for protocol in PROTOCOLS}
    for ranking, one in zip(ranked, truth, strict=True):
        for protocol, (right, left_out) in PROTOCOLS.items():
            positives = [image for kind in right for image in getattr(one, kind)]
            junk = [image for kind in left_out for image in getattr(one, kind)]
            found[protocol].append(positions(ranking, positives, junk))
    return {protocol: summarize(ranks) for protocol, ranks in found.items()}


# -------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class Retrieval(command.FeatureEvaluationSettings):
    """Find images of the same thing: a benchmark (paper section 4.2.1), or neighbours of yours."""

    renamed: ClassVar[dict[str, str]] = {"database": "data"}

    benchmark: str | None = None
    """A folder with gnd_NAME.pkl and jpg/ (Revisited Oxford or Paris), or with gnd.json, database/
    and queries/."""
    data: str | None = None
    """Instead of a benchmark, images to search: a folder, a list or demo. No ground truth."""
    queries: str | None = None
    """Images to look up in --data; without them each image of --data is looked up in the others."""
    size: int | None = None
    """Longer side of the images in pixels; as published by default 224, for Paris 512."""
    scales: Scales | None = None
    """single, or multi: the mean over scales 1, 0.71 and 0.5, the default for Paris."""
    query: Literal["whole", "box"] = "whole"
    """Look up whole images, as the published code does, or the box of the ground truth, as the
    benchmark's own protocol says."""
    k: int = 10
    """With --data: how many neighbours of each query."""

    def input_size(self, name: str) -> tuple[int, Scales]:
        """Longer side and scales for a data set of this name.

        Raises:
            UserError: for a size below 1.
        """
        size, scales = PAPER["paris" if "paris" in name.lower() else "oxford"]
        size = size if self.size is None else self.size
        if size < 1:
            raise UserError(f"--size must be a number of pixels, not {size}")
        return size, self.scales or scales

    def options(self, title: str) -> dict[str, Any]:
        """The keyword arguments of `extract`; images differ in size, so that each is a batch."""
        return {"batch": 1, "title": title, "memory_option": "--size", **self.extraction()}


def run(settings: Retrieval) -> dict[str, Any]:
    """`dino evaluate retrieval`: one table and JSON; or a list of neighbours and a contact sheet.

    Returns:
        For a benchmark the JSON's "retrieval": for each network and protocol `map` and mP@k in
        percent. Without ground truth the files that were written.

    Raises:
        UserError: for weights, images or a ground truth that do not exist or do not fit.
    """
    if (settings.benchmark is None) == (settings.data is None):
        raise UserError("give either --benchmark, or --data with your own images")
    if settings.benchmark is not None:
        return _benchmark(settings, settings.benchmark)
    return _neighbours(settings)


def _benchmark(settings: Retrieval, root: str) -> dict[str, Any]:
    if settings.queries is not None:
        raise UserError("a benchmark has its own queries: omit --queries")
    command.destination("retrieval", settings)
    benchmark, boxed = open_benchmark(root), settings.query == "box"
    size, scales = settings.input_size(benchmark.name)
    images = benchmark.boxed_queries() if boxed else benchmark.queries
    device = pick_device(settings.device)
    with process_group(device) as here:
        networks = settings.networks(device, rgb=True)
        found = {}
        for name, network in networks.items():
            what = query = descriptor(network, size, scales)
            if boxed:  # another key: the file of an image does not tell that it was cut
                boxes = [one.box for one in benchmark.truth]
                query = replace(what, settings={**what.settings, "boxes": boxes})
            options = settings.options(f"{name}, images")
            queries, database = (
                extract(network, source, how, **options).finite(complete_for=benchmark.name)
                for source, how in ((images, query), (benchmark.database, what))
            )
            found[name] = precisions(queries, database, benchmark.truth, device)
        content = {name: {p: _plain(score) for p, score in s.items()} for name, s in found.items()}
        if here.main:
            about: dict[str, Any] = {
                "data": benchmark.name,
                "images": len(benchmark.database),
                "queries": len(images),
                "query": settings.query,
                "size": size,
                "scales": SCALES[scales],
            }
            _print(found, about)
            about["networks"] = command.identities(networks)
            command.write(
                "retrieval", {"retrieval": content, **about}, networks[command.TRAINED], settings
            )
    return content


def _plain(score: Precisions) -> dict[str, Any]:
    return {
        "map": 100 * score.map,
        "mp": {str(k): 100 * value for k, value in score.at.items()},
        "queries": score.queries,
        "ap": [None if ap is None else 100 * ap for ap in score.aps],
    }


def _print(found: dict[str, dict[str, Precisions]], about: dict[str, Any]) -> None:
    scales = ", ".join(f"{scale:.2g}" for scale in about["scales"])
    title = (
        f"retrieval on {about['data']}, in %\n{about['queries']} queries ({about['query']}), "
        f"{about['images']} images, {about['size']} px, scales {scales}"
    )
    rows = {
        f"{protocol}, {name}": [
            *(f"{100 * value:.1f}" for value in (one.map, *one.at.values())),
            f"{one.queries}",
        ]
        for protocol in PROTOCOLS
        for name, scores in found.items()
        for one in (scores[protocol],)
    }
    kappas = next(iter(found.values()))["easy"].at
    columns = ["protocol", "mAP", *(f"mP@{k}" for k in kappas), "queries"]
    Console().print(command.table(title, columns, rows))


# ------------------------------------------------------------------------- without ground truth
def _neighbours(settings: Retrieval) -> dict[str, Any]:
    assert settings.data is not None
    if settings.baseline or settings.compare or settings.query == "box":
        raise UserError("--baseline, --compare and --query box need --benchmark")
    if settings.k < 1:
        raise UserError(f"--k must be at least 1, not {settings.k}")
    if ground_truths(Path(settings.data)):
        raise UserError(f"{settings.data} is a benchmark with ground truth: give it as --benchmark")
    command.destination("neighbours", settings)
    database = open_source(settings.data)
    queries = None if settings.queries is None else open_source(settings.queries)
    size, scales = settings.input_size("")
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = settings.networks(device, rgb=True)[command.TRAINED]
        what = descriptor(backbone, size, scales)
        bank = extract(backbone, database, what, **settings.options("images"))
        tested = bank
        if queries is not None:
            tested = extract(backbone, queries, what, **settings.options("queries"))
        k = min(settings.k, len(bank) - (queries is None))
        if k < 1:
            raise UserError(f"{settings.data} holds a single image: there is nothing to find")
        skip = 0 if queries is None else None
        similarity, index = nearest(tested.finite(), bank.finite(), k, skip=skip, device=device)
        files: dict[str, Any] = {}
        if here.main:
            content = {"queries": len(tested), "database": len(bank), "k": k}
            path = command.write("neighbours", {"neighbours": content}, backbone, settings)
            found = Neighbours(tested.paths, bank.paths, similarity.tolist(), index.tolist())
            files = found.write(path, database if queries is None else queries, database)
            for file in files.values():
                command.print_path(file)
    return files


@dataclass(frozen=True)
class Neighbours:
    """The most similar images of a database for each query, best first.

    Attributes:
        queries: paths of the queries.
        bank: paths of the images of the database.
        similarity: cosines, [q, k].
        index: into `bank`, [q, k].
    """

    queries: list[str]
    bank: list[str]
    similarity: list[list[float]]
    index: list[list[int]]

    def write(self, result: Path, queries: Source, database: Source) -> dict[str, Path]:
        """Write a CSV of all neighbours and a PNG of some queries with theirs.

        Args:
            result: the JSON file, beside which they lie.
            queries: to read images from.
            database: likewise.
        """
        listing, sheet = result.with_suffix(".csv"), result.with_suffix(".png")
        rows = (
            (query, rank, self.bank[i], f"{value:.6f}")
            for query, values, indices in zip(
                self.queries, self.similarity, self.index, strict=True
            )
            for rank, (value, i) in enumerate(zip(values, indices, strict=True), start=1)
        )
        atomic_csv(listing, ("query", "rank", "path", "similarity"), rows)
        save_sheet(sheet, self.sheet(queries, database))
        return {"csv": listing, "sheet": sheet}

    def sheet(self, queries: Source, database: Source) -> list[list[Cell]]:
        """Some queries, evenly spread and framed, each with its first neighbours."""
        count = min(SHEET[0], len(self.queries))
        looked_up, searched = ImagesByPath(queries), ImagesByPath(database)
        rows = []
        for row in (len(self.queries) * i // count for i in range(count)):
            found = list(zip(self.similarity[row], self.index[row], strict=True))[: SHEET[1]]
            cells = [searched.cell(self.bank[i], f"{value:.3f}") for value, i in found]
            rows.append([looked_up.cell(self.queries[row], "query", marked=True), *cells])
        return rows
