"""Image retrieval: which images of a database show the same thing (paper section 4.2.1, Table 3).

Measured on Revisited Oxford and Paris (Radenovic et al. 2018) and whatever is laid out like them;
or, without ground truth, the neighbours of a user's images as a list and a contact sheet.

Shapes: q queries, n images of the database, B batch, C channels, H W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from dino.evaluate.command import Measured, load_rgb, networks, table, write
from dino.evaluate.contact_sheet import Pictures, save_sheet
from dino.evaluate.features.cache import Descriptor, described
from dino.evaluate.features.search import nearest
from dino.evaluate.retrieval.ranking_metrics import Precisions, positions, rankings, summarize
from dino.evaluate.retrieval.revisited import Benchmark, Truth, open_benchmark
from dino.files import UserError, atomic_csv
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group

Scales = Literal["single", "multi"]

SCALES: dict[Scales, tuple[float, ...]] = {"single": (1.0,), "multi": (1.0, 2**-0.5, 0.5)}
"""How large the network sees an image, relative to `--size`."""

PAPER: dict[str, tuple[int, Scales]] = {"oxford": (224, "single"), "paris": (512, "multi")}
"""Longer side and scales of the published numbers, by a word in the name of the data set."""

JUDGED = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""What counts as right and what is left out of the ranking, by protocol."""

SHOWN = (12, 8)
"""At most so many queries, and neighbours of each, are on a contact sheet."""


# -------------------------------------------------------------------------------- the feature
@dataclass(frozen=True)
class Shrunk:
    """A transform that keeps the aspect ratio: the longer side is at most `size`; never enlarged.

    Only a side below `least`, of which the network could not see a single patch, is stretched to
    it. Pillow's Lanczos filter, as in the published code.
    """

    size: int
    least: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Float[Tensor, "C H W"]:
        """Turn a picture into the network's input."""
        small = to_rgb(image).copy()
        small.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        if min(small.size) < self.least:
            width, height = (max(side, self.least) for side in small.size)
            small = small.resize((width, height), Image.Resampling.LANCZOS)
        return normalize(to_tensor(small), self.mean, self.std)


def multiscale(
    backbone: Backbone, images: Float[Tensor, "B C H W"], scales: Sequence[float]
) -> Float[Tensor, "B D"]:
    """The mean feature over images seen at several scales, of length 1 where there are several.

    The normalised pixels are resized bilinearly, without antialiasing. The published code divides
    by the norm of the whole batch, which is this for its batches of one.
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
    factors = SCALES[scales]
    least = -int(-(backbone.patch_size or 32) // min(factors))  # rounded up
    own = backbone.preprocessing
    transform = Shrunk(size, least, own.mean, own.std)
    return Descriptor(
        f"retrieval-{scales}",
        transform,
        partial(multiscale, scales=factors),
        {"scales": list(factors)},
    )


# ------------------------------------------------------------------------------ the benchmark
def precisions(
    queries: Float[Tensor, "q D"],
    database: Float[Tensor, "n D"],
    truth: Sequence[Truth],
    device: torch.device | str | None = None,
) -> dict[str, Precisions]:
    """Mean average precision and mP@k of features, for "easy", "medium" and "hard"."""
    return judge(rankings(queries, database, device=device), truth)


def judge(ranked: Iterable[Int[np.ndarray, " n"]], truth: Sequence[Truth]) -> dict[str, Precisions]:
    """What `precisions` says, of rankings of the database, best first, one for each query."""
    found: dict[str, list[list[int]]] = {protocol: [] for protocol in JUDGED}
    for ranking, judged in zip(ranked, truth, strict=True):
        for protocol, (right, left_out) in JUDGED.items():
            positives = [image for kind in right for image in getattr(judged, kind)]
            junk = [image for kind in left_out for image in getattr(judged, kind)]
            found[protocol].append(positions(ranking, positives, junk))
    return {protocol: summarize(ranks) for protocol, ranks in found.items()}


# -------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class Retrieval(Measured):
    """Find images of the same thing: a benchmark (paper section 4.2.1), or neighbours of yours."""

    data: str | None = None
    """A benchmark: a folder with gnd_NAME.pkl and jpg/ (Revisited Oxford or Paris), or with
    gnd.json, database/ and queries/."""
    database: str | None = None
    """Instead of a benchmark, images to search: a folder, a list or demo. No ground truth."""
    queries: str | None = None
    """Images to ask for in --database; without them each of its images asks for all others."""
    size: int | None = None
    """Longer side of the images in pixels; as published by default 224, for Paris 512."""
    scales: Scales | None = None
    """single, or multi: the mean over scales 1, 0.71 and 0.5, the default for Paris."""
    query: Literal["whole", "box"] = "whole"
    """Ask for whole images, as the published code does, or for the box of the ground truth, as the
    benchmark's own protocol says."""
    k: int = 10
    """With --database: how many neighbours of each query."""

    def seen(self, name: str) -> tuple[int, Scales]:
        """Longer side and scales for a data set of this name.

        Raises:
            UserError: for a size that is none.
        """
        usual = PAPER["paris" if "paris" in name.lower() else "oxford"]
        size = usual[0] if self.size is None else self.size
        if size < 1:
            raise UserError(f"--size must be a number of pixels, not {size}")
        return size, self.scales or usual[1]


def run(settings: Retrieval) -> dict[str, Any]:
    """`dino evaluate retrieval`: one table and JSON; or a list of neighbours and a contact sheet.

    Returns:
        For a benchmark what the JSON says under "retrieval": for each network and protocol `map`
        and mP@k in percent. Without ground truth the files that were written.

    Raises:
        UserError: for weights, images or a ground truth that are not there or do not fit.
    """
    if (settings.data is None) == (settings.database is None):
        raise UserError("give either --data with a benchmark, or --database with your own images")
    return _benchmark(settings) if settings.data is not None else _neighbours(settings)


def _benchmark(settings: Retrieval) -> dict[str, Any]:
    assert settings.data is not None
    if settings.queries is not None:
        raise UserError("a benchmark has its own queries: leave --queries out")
    benchmark = open_benchmark(settings.data)
    size, scales = settings.seen(benchmark.name)
    boxed = settings.query == "box"
    asked = benchmark.boxed_queries() if boxed else benchmark.queries
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load_rgb(settings.weights, device)
        found = {}
        for name, network in networks(backbone, settings).items():
            whole = descriptor(network, size, scales)
            how = {"batch": 1, "title": f"{name}, images", **settings.extraction()}
            query = _with_boxes(whole, benchmark) if boxed else whole
            queries, database = (
                described(network, images, what, **how).checked(needs_all=benchmark.name)
                for images, what in ((asked, query), (benchmark.database, whole))
            )
            found[name] = precisions(queries, database, benchmark.truth, device)
        content = {name: {p: _plain(score) for p, score in s.items()} for name, s in found.items()}
        if here.main:
            about = {
                "data": benchmark.name,
                "images": len(benchmark.database),
                "queries": len(asked),
                "query": settings.query,
                "size": size,
                "scales": SCALES[scales],
            }
            _print(found, about)
            write("retrieval", {"retrieval": content, **about}, backbone, settings)
    return content


def _with_boxes(whole: Descriptor, benchmark: Benchmark) -> Descriptor:
    """The same descriptor under another key: the files do not tell that they were cut."""
    boxes = [truth.box for truth in benchmark.truth]
    return Descriptor(
        whole.name, whole.transform, whole.compute, {**whole.settings, "boxes": boxes}
    )


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
            f"{100 * scores[protocol].map:.1f}",
            *(f"{100 * value:.1f}" for value in scores[protocol].at.values()),
            f"{scores[protocol].queries}",
        ]
        for protocol in JUDGED
        for name, scores in found.items()
    }
    kappas = next(iter(found.values()))["easy"].at
    columns = ["protocol", "mAP", *(f"mP@{k}" for k in kappas), "queries"]
    Console().print(table(title, columns, rows))


# ------------------------------------------------------------------------- without ground truth
def _neighbours(settings: Retrieval) -> dict[str, Any]:
    if settings.baseline or settings.query == "box":
        option = "--baseline" if settings.baseline else "--query box"
        raise UserError(f"{option} needs a benchmark with ground truth: give --data")
    if settings.k < 1:
        raise UserError(f"--k must be at least 1, not {settings.k}")
    database = open_source(settings.database)
    queries = None if settings.queries is None else open_source(settings.queries)
    size, scales = settings.seen("")
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load_rgb(settings.weights, device)
        what = descriptor(backbone, size, scales)
        how = {"batch": 1, **settings.extraction()}
        bank = described(backbone, database, what, title="images", **how)
        asked = bank
        if queries is not None:
            asked = described(backbone, queries, what, title="queries", **how)
        own = queries is None
        k = min(settings.k, len(bank) - own)
        if k < 1:
            raise UserError(f"{settings.database} holds a single image: there is nothing to find")
        skip = 0 if own else None
        similarity, index = nearest(asked.checked(), bank.checked(), k, skip=skip, device=device)
        files: dict[str, Any] = {}
        if here.main:
            content = {"queries": len(asked), "database": len(bank), "k": k}
            path = write("neighbours", {"neighbours": content}, backbone, settings)
            found = Neighbours(asked.paths, bank.paths, similarity.cpu(), index.cpu())
            files = found.write(path, (database if queries is None else queries, database))
            for file in files.values():
                Console().print(f"{file}", highlight=False, soft_wrap=True)
    return files


@dataclass(frozen=True)
class Neighbours:
    """The most similar images of a database for each query, best first.

    Attributes:
        asked: where each query lies.
        bank: where each image of the database lies.
        similarity: cosines.
        index: into `bank`.
    """

    asked: list[str]
    bank: list[str]
    similarity: Float[Tensor, "q k"]
    index: Int[Tensor, "q k"]

    def write(self, result: Path, sources: tuple[Source, Source]) -> dict[str, Path]:
        """Write a CSV of all neighbours and a PNG of some queries with theirs, beside `result`.

        Args:
            result: the JSON file.
            sources: of the queries and of the database, to read pictures from.
        """
        listing, picture = result.with_suffix(".csv"), result.with_suffix(".png")
        rows = (
            (query, rank, self.bank[i], f"{value:.6f}")
            for query, values, indices in zip(
                self.asked, self.similarity.tolist(), self.index.tolist(), strict=True
            )
            for rank, (value, i) in enumerate(zip(values, indices, strict=True), start=1)
        )
        atomic_csv(listing, ("query", "rank", "path", "similarity"), rows)
        save_sheet(picture, self.sheet(*sources))
        return {"csv": listing, "sheet": picture}

    def sheet(self, queries: Source, database: Source) -> list[list[Cell]]:
        """Some queries, evenly spread and framed, each with its first neighbours."""
        count = min(SHOWN[0], len(self.asked))
        pictures = (Pictures(queries), Pictures(database))
        rows = []
        for row in (len(self.asked) * i // count for i in range(count)):
            found = zip(self.similarity[row].tolist(), self.index[row].tolist(), strict=True)
            cells = [pictures[0].cell(self.asked[row], "query", marked=True)]
            cells += [
                pictures[1].cell(self.bank[i], f"{value:.3f}")
                for value, i in list(found)[: SHOWN[1]]
            ]
            rows.append(cells)
        return rows
