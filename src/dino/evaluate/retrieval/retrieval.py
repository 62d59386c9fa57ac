"""Image retrieval: the images of a database that show the same object (section 4.2.1, Table 3).

Measured on Revisited Oxford and Paris (Radenovic et al. 2018) and folders laid out like them; or,
without ground truth, the neighbours of a user's images as a list and a contact sheet.

Shapes: q queries, n images of the database, B batch, C channels, H W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from rich.table import Table
from torch import Tensor

from dino.data.images.decode import to_rgb, to_tensor
from dino.data.sources.open import Source, open_source
from dino.data.views.photometric import normalize
from dino.evaluate import command
from dino.evaluate.retrieval.ranking_metrics import KAPPAS, positions, rankings, summarize
from dino.evaluate.retrieval.revisited import Benchmark, GroundTruth, ground_truths, open_benchmark
from dino.features.command import OptionalImages, number_table
from dino.features.contact_sheet import neighbour_rows, save_sheet
from dino.features.extractor import Descriptor, extract
from dino.features.search import nearest
from dino.features.table import FeatureTable
from dino.files import UserError, atomic_csv, check_outside
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated

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
    resized = (F.interpolate(images, scale_factor=scale, mode="bilinear") for scale in scales)
    return F.normalize(torch.stack([backbone(one) for one in resized]).mean(dim=0), dim=1)


def descriptor(backbone: Backbone, size: int, scales: Scales = "single") -> Descriptor:
    """The feature of the paper (CLS token, or pooled) of images of at most `size` pixels a side."""
    factors, preprocessing = SCALES[scales], backbone.preprocessing
    least = -int(-(backbone.patch_size or 32) // min(factors))  # rounded up
    transform = MaxSideResize(size, least, preprocessing.mean, preprocessing.std)
    compute = partial(multiscale, scales=factors)
    return Descriptor(f"retrieval-{scales}", transform, compute, {"scales": list(factors)})


# ------------------------------------------------------------------------------ the benchmark
def scores_by_protocol(
    ranked: Iterable[Int[np.ndarray, " n"]], truth: Sequence[GroundTruth]
) -> dict[str, dict[str, Any]]:
    """What `summarize` returns, for "easy", "medium" and "hard".

    Args:
        ranked: for each query the images of the database, best first.
        truth: one for each query.
    """
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
    """Find images of the same object: a benchmark (paper section 4.2.1), or neighbours of yours."""

    renamed: ClassVar[dict[str, str]] = {"database": "data"}

    benchmark: OptionalImages = None
    """A folder with gnd_NAME.pkl and jpg/ (Revisited Oxford or Paris), or with gnd.json, database/
    and queries/."""
    data: OptionalImages = None
    """Instead of a benchmark, images to search: a folder, a list or demo. No ground truth."""
    queries: OptionalImages = None
    """Images to look up in --data; without them each image of --data is looked up in the others."""
    size: Annotated[int, Range(low=1)] | None = None
    """Longer side of the images in pixels; as published by default 224, for Paris 512."""
    scales: Scales | None = None
    """single, or multi: the mean over scales 1, 0.71 and 0.5, the default for Paris."""
    query: Literal["whole", "box"] = "whole"
    """Look up entire images, as the published code does, or the box of the ground truth, as the
    benchmark's protocol says."""
    k: Annotated[int, Range(low=1)] = 10
    """With --data: how many neighbours of each query."""

    def input_size(self, name: str) -> tuple[int, Scales]:
        """Longer side and scales for a data set of this name."""
        size, scales = PAPER["paris" if "paris" in name.lower() else "oxford"]
        return self.size or size, self.scales or scales

    def extract(
        self, network: Backbone, source: Source, feature: Descriptor, title: str
    ) -> FeatureTable:
        """Features of a source; its images differ in size, so that each is a batch."""
        options = {"batch": 1, "title": title, "memory_option": "--size", **self.extraction()}
        return extract(network, source, feature, **options)


def run(settings: Retrieval) -> dict[str, Any]:
    """`dino evaluate retrieval`: one table and JSON; or a list of neighbours and a contact sheet.

    Returns:
        For a benchmark the JSON's "retrieval": for each network and protocol `map` and mP@k in
        percent. Without ground truth the files that were written.

    Raises:
        UserError: for weights, images or a ground truth that are missing or inconsistent.
    """
    settings = validated(settings)
    check_outside(settings.out, settings.data)  # pictures are written beside it
    if settings.benchmark is not None and settings.data is None:
        return _benchmark(settings, settings.benchmark)
    if settings.data is not None and settings.benchmark is None:
        return _neighbours(settings, settings.data)
    raise UserError("give either --benchmark, or --data with your images")


def _benchmark(settings: Retrieval, root: str) -> dict[str, Any]:
    if settings.queries is not None:
        raise UserError("a benchmark contains its queries: omit --queries")
    with command.evaluation_run("retrieval", settings, root, rgb=True) as started:
        benchmark = open_benchmark(root, boxed=settings.query == "box")
        size, scales = settings.input_size(benchmark.name)
        found = {
            name: _scores(settings, benchmark, network, f"{name}, images")
            for name, network in started.networks.items()
        }
        about = {
            "images": len(benchmark.database),
            "queries": len(benchmark.queries),
            "query": settings.query,
            "size": size,
            "scales": SCALES[scales],
        }
        principal = {
            f"mAP, {protocol}": {
                name: {"percent": of[protocol]["map"]} for name, of in found.items()
            }
            for protocol in PROTOCOLS
        }
        started.report(
            {"retrieval": found, **about},
            _table(found, benchmark.name, about),
            images=len(benchmark.queries),
            scores=principal,
        )
    return found


def _scores(
    settings: Retrieval, benchmark: Benchmark, network: Backbone, title: str
) -> dict[str, dict[str, Any]]:
    """By protocol, in percent."""
    full = query = descriptor(network, *settings.input_size(benchmark.name))
    if benchmark.queries.boxes is not None:  # the cache distinguishes files, not their boxes
        query = replace(full, settings={**full.settings, "boxes": benchmark.queries.boxes})
    queries, database = (
        settings.extract(network, source, how, title).finite(complete_for=benchmark.name)
        for source, how in ((benchmark.queries, query), (benchmark.database, full))
    )
    device = next(network.parameters()).device
    return scores_by_protocol(rankings(queries, database, device=device), benchmark.truth)


def _table(found: dict[str, dict[str, dict[str, Any]]], data: str, about: dict[str, Any]) -> Table:
    scales = ", ".join(f"{scale:.2g}" for scale in about["scales"])
    title = (
        f"retrieval on {data}, in %\n{about['queries']} queries ({about['query']}), "
        f"{about['images']} images, {about['size']} px, scales {scales}"
    )
    rows = {}
    for protocol in PROTOCOLS:
        for name, scores in found.items():
            one = scores[protocol]
            values = [f"{value:.1f}" for value in (one["map"], *one["mp"].values())]
            rows[f"{protocol}, {name}"] = [*values, f"{one['queries']}"]
    columns = ["protocol", "mAP", *(f"mP@{k}" for k in KAPPAS), "queries"]
    return number_table(title, columns, rows)


# ------------------------------------------------------------------------- without ground truth
def _neighbours(settings: Retrieval, data: str) -> dict[str, Any]:
    if settings.baseline or settings.compare or settings.query == "box":
        raise UserError("--baseline, --compare and --query box need --benchmark")
    if ground_truths(Path(data)):
        raise UserError(f"{data} is a benchmark with ground truth: give it as --benchmark")
    names = (data, settings.queries)
    with command.evaluation_run("neighbours", settings, *names, rgb=True) as started:
        database = open_source(data)
        queries = None if settings.queries is None else open_source(settings.queries)
        backbone = started.networks[command.TRAINED]
        feature = descriptor(backbone, *settings.input_size(""))
        bank = tested = settings.extract(backbone, database, feature, "images")
        if queries is not None:
            tested = settings.extract(backbone, queries, feature, "queries")
        k = min(settings.k, len(bank) - (queries is None))
        if k < 1:
            raise UserError(f"{data} holds a single image: there is nothing to find")
        skip = 0 if queries is None else None
        device = next(backbone.parameters()).device
        similarity, index = nearest(tested.finite(), bank.finite(), k, skip=skip, device=device)
        files = {"csv": started.path.with_suffix(".csv"), "sheet": started.path.with_suffix(".png")}
        if ranks().main:
            neighbours = [
                [(bank.paths[i], value) for i, value in zip(*row, strict=True)]
                for row in zip(index.tolist(), similarity.tolist(), strict=True)
            ]
            lines = (
                (query, rank, path, f"{value:.6f}")
                for query, found in zip(tested.paths, neighbours, strict=True)
                for rank, (path, value) in enumerate(found, start=1)
            )
            atomic_csv(files["csv"], ("query", "rank", "path", "similarity"), lines)
            save_sheet(files["sheet"], *neighbour_rows(database, queries, tested.paths, neighbours))
        content = {"queries": len(tested), "database": len(bank), "k": k}
        sentence = f"{k} neighbours of {len(tested):,} queries among {len(bank):,} images"
        written = [*files.values()]
        started.report({"neighbours": content}, sentence, images=len(tested), files=written)
    return files
