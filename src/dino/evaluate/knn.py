"""Weighted nearest neighbours on frozen features (paper section 3.2 and appendix F.1).

No parameter is trained: the class of an image is voted by its k most similar images of a bank.

Shapes: n images of the bank, q queries, D width, ks values of k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino.data.sources import Source, open_source
from dino.evaluate.features import extract, pixels, provenance
from dino.evaluate.neighbours import nearest
from dino.evaluate.results import beside
from dino.evaluate.table import FeatureTable, Part, labels_of, matched_labels
from dino.files import UserError, atomic_json
from dino.models.features import Backbone
from dino.runtime import Precision, pick_device, process_group
from dino.weights.load import load, untrained_like

K = (10, 20, 100, 200)
"""The k of the paper; 20 is its best."""

TEMPERATURE = 0.07
"""The temperature of the votes in the paper."""

PANEL = 2**15
"""Queries whose neighbours are searched during one pass over the bank: each pass moves the whole
bank to the device once, and holds k similarities and indices for each query."""


TASK = "k-NN"


class Accuracy(NamedTuple):
    """Shares of rightly classified queries, in percent."""

    top1: float
    top5: float


@torch.inference_mode()
def knn(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    query_labels: Int[Tensor, " q"],
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    *,
    leave_one_out: bool = False,
    chunk: int = 512,
    tile: int = 2**16,
    device: torch.device | str | None = None,
) -> dict[int, Accuracy]:
    """Accuracy of weighted k-nearest-neighbour votes, for each k (paper section 3.2).

    The k bank images of highest cosine similarity vote for their class with weight
    exp(similarity / temperature). Classes are ordered by their votes, equal ones (also those
    without any vote) by their label; so does the published code wherever its sort is stable (up to
    16 classes), beyond that its order of equal votes is arbitrary. Top-5 means the first
    min(5, k).

    Args:
        bank: features of any length; float64 is computed in float64, all else in float32.
        bank_labels: any integers, in any number.
        queries: features to be classified.
        query_labels: their labels; one that the bank lacks can only be found by the tie rule.
        k: how many neighbours vote. All values are computed in one pass.
        temperature: positive; the smaller, the more the nearest counts.
        leave_one_out: `queries` are the bank itself, and no image votes for itself.
        chunk: queries at a time; chunk x tile similarities exist at once.
        tile: bank images at a time.
        device: where to compute; features may stay elsewhere. By default where `queries` are.

    Returns:
        Accuracies by k, ascending. A k beyond the (remaining) bank is clipped to it: the keys are
        the k really used.

    Raises:
        UserError: for sizes that do not fit, features that are not finite, k < 1 or
            temperature <= 0.
    """
    _check(bank, bank_labels, queries, query_labels, leave_one_out)
    used = usable_k(k, len(bank) - leave_one_out)
    if not temperature > 0:
        raise UserError(f"the temperature of k-NN must be positive, not {temperature}")
    device = torch.device(device) if device is not None else queries.device
    classes = torch.unique(torch.cat([bank_labels.cpu(), query_labels.cpu()]))
    votes_for = torch.searchsorted(classes, bank_labels.cpu()).to(device)
    truth = torch.searchsorted(classes, query_labels.cpu()).to(device)
    hits = torch.zeros(len(used), 2, dtype=torch.int64, device=device)
    for start in range(0, len(queries), PANEL):
        panel = slice(start, start + PANEL)
        similarity, index = nearest(
            queries[panel],
            bank,
            used[-1],
            skip=start if leave_one_out else None,
            chunk=chunk,
            tile=tile,
            device=device,
        )
        # Relative to the nearest neighbour: same order of classes, no overflow at small T.
        weights = ((similarity - similarity[:, :1]) / temperature).exp_()
        for part in zip(
            torch.split(weights, chunk),
            torch.split(votes_for[index], chunk),
            torch.split(truth[panel], chunk),
            strict=True,
        ):
            hits += _hits(*part, used, len(classes))
    percent = (100 * hits.double() / len(queries)).tolist()
    return {n: Accuracy(*row) for n, row in zip(used, percent, strict=True)}


def usable_k(k: Sequence[int], limit: int) -> list[int]:
    """The different k, ascending, none larger than the `limit` images that can be neighbours.

    Raises:
        UserError: if there is no k, a k below 1, or no image to vote.
    """
    if not k or min(k) < 1:
        raise UserError(f"k of k-NN must be one or more numbers from 1 on, not {tuple(k)}")
    if limit < 1:
        raise UserError("k-NN needs at least one image in the bank besides the query itself")
    return sorted({min(n, limit) for n in k})


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, loo: bool) -> None:
    if len(queries) == 0:
        raise UserError("k-NN got no query image")
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        shapes = f"{tuple(bank.shape)} and {tuple(queries.shape)}"
        raise UserError(f"features of bank and queries must be [n, D] and [q, D], not {shapes}")
    if len(bank_labels) != len(bank) or len(labels) != len(queries):
        raise UserError("k-NN needs one label for each image of the bank and of the queries")
    if loo and len(bank) != len(queries):
        raise UserError("leave-one-out needs the bank itself as queries")
    for features in (bank, queries):
        if len(features) and not torch.stack(features.aminmax()).isfinite().all():
            raise UserError("the features hold NaN or infinity: the network has diverged")


def _hits(
    weights: Float[Tensor, "q k"],
    voted: Int[Tensor, "q k"],
    truth: Int[Tensor, " q"],
    used: Sequence[int],
    classes: int,
) -> Int[Tensor, "ks 2"]:
    """How many queries have their class first, and among the first min(5, k), for each k."""
    votes = weights.new_zeros(len(weights), classes)
    lower = torch.arange(classes, device=truth.device) < truth[:, None]
    counts = []
    for nearer, n in pairwise([0, *used]):  # each k adds its neighbours to the votes of the last
        votes.scatter_add_(1, voted[:, nearer:n], weights[:, nearer:n])
        own = votes.gather(1, truth[:, None])
        place = (votes > own).sum(dim=1) + ((votes == own) & lower).sum(dim=1)
        counts.append(torch.stack([(place < 1).sum(), (place < min(5, n)).sum()]))
    return torch.stack(counts)


# ------------------------------------------------------------------------------- of a network
def accuracies(
    bank: FeatureTable,
    queries: FeatureTable | None,
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str | None = None,
) -> dict[int, Accuracy]:
    """`knn` on tables; without queries, leave-one-out on the bank.

    Classes of the two tables are matched by name where both have names.
    """
    bank_labels = labels_of(bank, TASK)
    truth = bank_labels if queries is None else matched_labels(queries, bank.classes, TASK)
    return knn(
        bank.features,
        bank_labels,
        (bank if queries is None else queries).features,
        truth,
        k,
        temperature,
        leave_one_out=queries is None,
        device=device,
    )


class KNNEvaluation:
    """k-NN during training: an `Evaluation` (see `dino.evaluate.protocol`).

    Args:
        bank: labelled images that vote.
        queries: labelled images to classify; None for leave-one-out on the bank.
        k: numbers of neighbours.
        temperature: of the votes.
        limit: at most so many images of each source, evenly spread over it.
        batch: images at a time.
        workers: processes that read images.
        precision: of the forward pass.

    Raises:
        UserError: if a source has no labels.
    """

    name = "knn"

    def __init__(
        self,
        bank: Source,
        queries: Source | None = None,
        *,
        k: Sequence[int] = (10, 20),
        temperature: float = TEMPERATURE,
        limit: int | None = None,
        batch: int = 64,
        workers: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        for source in (bank, queries):
            if source is not None:
                labels_of(source, TASK)
        self.bank = spread(bank, limit)
        self.queries = None if queries is None else spread(queries, limit)
        self.k, self.temperature = tuple(k), temperature
        self.batch, self.workers, self.precision = batch, workers, precision

    @property
    def asked(self) -> int:
        """Images that are classified."""
        return len(self.bank if self.queries is None else self.queries)

    def run(self, backbone: Backbone) -> dict[str, float]:
        """Top-1 accuracy in percent, for example `{"k10": 61.2, "k20": 62.0}`."""
        table = partial(
            extract,
            backbone,
            batch=self.batch,
            workers=self.workers,
            precision=self.precision,
            title="k-NN",
        )
        queries = None if self.queries is None else table(self.queries)
        device = next(backbone.parameters()).device
        scores = accuracies(table(self.bank), queries, self.k, self.temperature, device)
        return {f"k{n}": score.top1 for n, score in scores.items()}


def spread(source: Source, limit: int | None) -> Source:
    """At most `limit` images of a source, evenly spread over it; None for all of them."""
    if limit is None or len(source) <= limit:
        return source
    return Part(source, [len(source) * i // limit for i in range(limit)])


# ------------------------------------------------------------------------------------ command
@dataclass(frozen=True, kw_only=True)
class KNN:
    """Classify images by their nearest neighbours among features (paper section 3.2)."""

    weights: str
    """Run folder, file of weights or published name."""
    data: str
    """The bank: a folder with one sub-folder for each class, a list with labels, or demo."""
    queries: str | None = None
    """Images to classify, laid out like the bank; without it each image of the bank in turn is
    classified by all others."""
    k: tuple[int, ...] = K
    """How many neighbours vote; one or more numbers."""
    temperature: float = TEMPERATURE
    """Of the votes: exp(similarity / temperature)."""
    baselines: bool = False
    """Also measure the untrained network and raw pixels."""
    batch: int = 64
    """Images at a time."""
    workers: int = 4
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """fp32, or bf16 for speed."""
    out: Path | None = None
    """Where the result goes as JSON; by default beside the weights."""


def run(settings: KNN) -> dict[str, dict[int, Accuracy]]:
    """`dino evaluate knn`: one table, and JSON with its provenance.

    Returns:
        Accuracies by k for "trained" and, with baselines, "untrained" and "pixels".

    Raises:
        UserError: for weights or data that are not there or have no classes.
    """
    device = pick_device(settings.device)
    usable_k(settings.k, max(settings.k, default=0))  # refuse nonsense before the work
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        sources = [open_source(data) for data in (settings.data, settings.queries) if data]
        for source in sources:
            labels_of(source, TASK)
        results, sizes = compare(backbone, *sources, settings=settings)
        if here.main:
            _print(results, sizes, settings)
            path = settings.out or beside(settings.weights, "knn")
            knn_rows = {
                row: {f"k{n}": score._asdict() for n, score in scores.items()}
                for row, scores in results.items()
            }
            about = {**sizes, "leave_one_out": len(sources) == 1}
            atomic_json(path, {"knn": knn_rows, **about, **provenance(backbone, settings)})
    return results


class Comparison(NamedTuple):
    """Accuracies by k of the network and, if asked for, of what it has to beat.

    Attributes:
        scores: for "trained", "untrained" and "pixels".
        sizes: images that served as "bank" and as "queries", and how many were "skipped" because
            they cannot be used.
    """

    scores: dict[str, dict[int, Accuracy]]
    sizes: dict[str, int]


def compare(
    backbone: Backbone, bank: Source, queries: Source | None = None, *, settings: KNN
) -> Comparison:
    """Measure the network and, if `settings.baselines`, its untrained twin and raw pixels."""
    how: dict[str, Any] = {"batch": settings.batch, "workers": settings.workers}
    through = partial(extract, precision=settings.precision, **how)
    tables: dict[str, Callable[[Source], FeatureTable]] = {"trained": partial(through, backbone)}
    if settings.baselines:
        untrained = untrained_like(backbone)
        tables["untrained"] = partial(through, untrained, title="untrained network")
        tables["pixels"] = partial(pixels, **how)
    device = next(backbone.parameters()).device
    scores, sizes = {}, {}
    for row, table in tables.items():
        voting, asked = table(bank), None if queries is None else table(queries)
        scores[row] = accuracies(voting, asked, settings.k, settings.temperature, device)
        used = [voting] if asked is None else [voting, asked]
        skipped = sum(len(one.skipped) for one in used)
        sizes = {"bank": len(voting), "queries": len(used[-1]), "skipped": skipped}
    return Comparison(scores, sizes)


def _print(
    results: Mapping[str, Mapping[int, Accuracy]], sizes: Mapping[str, int], settings: KNN
) -> None:
    how = f"{sizes['queries']} queries" if settings.queries else "leave-one-out"
    table = Table(
        title=f"k-NN accuracy, top-1 / top-5 in %\n{how}, {sizes['bank']} images in the bank, "
        f"T = {settings.temperature:g}"
    )
    table.add_column("features")
    for n in results["trained"]:
        table.add_column(f"k = {n}", justify="right")
    for row, scores in results.items():
        table.add_row(row, *(f"{score.top1:.1f} / {score.top5:.1f}" for score in scores.values()))
    console = Console()
    console.print(table)
    largest = max(results["trained"])
    if max(settings.k) > largest:
        console.print(f"k beyond the bank was clipped to {largest}", style="yellow")
