"""Weighted nearest neighbours on frozen features (paper section 3.2 and appendix F.1)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.knn_classifier import (
    TEMPERATURE,
    Accuracy,
    K,
    Votes,
    usable_k,
    vote,
)
from dino.evaluate.command import TRAINED, Measured, beside, networks, table, write
from dino.evaluate.features.export import extract, pixels
from dino.evaluate.features.table import FeatureTable, Part, labels_of, matched_labels
from dino.files import atomic_write
from dino.models.backbone import Backbone
from dino.runtime import Precision, pick_device, process_group
from dino.weights.load import load

TASK = "k-NN"

PAIRS = 10
"""Confused classes that are printed."""


def accuracies(
    bank: FeatureTable,
    queries: FeatureTable | None,
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str | None = None,
) -> dict[int, Accuracy]:
    """`knn` on tables, see `votes_of`."""
    return votes_of(bank, queries, k, (temperature,), device).accuracies(temperature)


def votes_of(
    bank: FeatureTable,
    queries: FeatureTable | None,
    k: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device | str | None = None,
) -> Votes:
    """`vote` on tables; without queries, leave-one-out on the bank.

    Classes of the two tables are matched by name where both have names.
    """
    bank_labels = labels_of(bank, TASK)
    truth = bank_labels if queries is None else matched_labels(queries, bank.classes, TASK)
    return vote(
        bank.features,
        bank_labels,
        (bank if queries is None else queries).features,
        truth,
        k,
        temperatures,
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
class KNN(Measured):
    """Classify images by their nearest neighbours among features (paper section 3.2)."""

    data: str
    """The bank: a folder with one sub-folder for each class, a list with labels, or demo."""
    queries: str | None = None
    """Images to classify, laid out like the bank; without it each image of the bank in turn is
    classified by all others."""
    banks: tuple[str, ...] = ()
    """More banks, each measured like the first and on its own."""
    k: tuple[int, ...] = K
    """How many neighbours vote; one or more numbers."""
    temperature: tuple[float, ...] = (TEMPERATURE,)
    """Of the votes, exp(similarity / temperature); one or more numbers."""
    baseline: bool = False
    """Also measure the untrained network and raw pixels."""
    confusion: bool = False
    """Also write the accuracy of each class and what it is taken for (CSV), for the first bank and
    the best k and temperature."""
    batch: int = 64
    """Images at a time."""


def run(settings: KNN) -> dict[str, dict[int, Accuracy]]:
    """`dino evaluate knn`: one table, and JSON with its provenance.

    Returns:
        Accuracies by k for "trained" and, with `baseline`, "untrained" and "pixels"; a bank or
        temperature that is not the only one stands behind the name.

    Raises:
        UserError: for weights or data that are not there or have no classes.
    """
    data, asked = use_splits(settings.data, settings.queries)
    settings = replace(settings, data=str(data), queries=None if asked is None else str(asked))
    device = pick_device(settings.device)
    usable_k(settings.k, max(settings.k, default=0))  # refuse nonsense before the work
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        form, asked = backbone.preprocessing.pixels, settings.queries
        banks = {data: open_source(data, form) for data in (settings.data, *settings.banks)}
        queries = None if asked is None else open_source(asked, form)
        for source in (*banks.values(), queries):
            if source is not None:
                labels_of(source, TASK)
        store = settings.extraction()["store"]
        measured = {
            name: _votes(tables, banks, queries, settings, device)
            for name, tables in _tables(backbone, settings, store).items()
        }
        found = _rows(measured)
        if here.main:
            first = measured[TRAINED][settings.data]
            about: dict[str, Any] = {**first.sizes, "leave_one_out": queries is None}
            Console().print(_table(found, first.sizes, settings))
            if settings.confusion:
                about |= _confused(first, settings)
            if max(settings.k) > max(first.votes.k):
                clipped = f"k beyond the bank was clipped to {max(first.votes.k)}"
                Console().print(clipped, style="yellow")
            rows = {
                name: {f"k{n}": score._asdict() for n, score in scores.items()}
                for name, scores in found.items()
            }
            write("knn", {"knn": rows, **about}, backbone, settings)
    return found


class Measurement(NamedTuple):
    """Votes of one bank.

    Attributes:
        votes: of its images.
        names: of the classes that the votes count.
        sizes: images that served as "bank" and as "queries", and how many were "skipped" because
            they cannot be used.
    """

    votes: Votes
    names: list[str]
    sizes: dict[str, int]


class Comparison(NamedTuple):
    """Accuracies by k of the network and of what it has to beat.

    Attributes:
        scores: for "trained", "untrained" and "pixels".
        sizes: see `Measurement`.
    """

    scores: dict[str, dict[int, Accuracy]]
    sizes: dict[str, int]


def compare(
    backbone: Backbone, bank: Source, queries: Source | None = None, *, settings: KNN
) -> Comparison:
    """Measure the network and, if `settings.baseline`, its untrained twin and raw pixels.

    Nothing is stored; of several temperatures the first counts.
    """
    device = next(backbone.parameters()).device
    measured = {
        name: _votes(tables, {"": bank}, queries, settings, device)[""]
        for name, tables in _tables(backbone, settings, None).items()
    }
    scores = {n: one.votes.accuracies(settings.temperature[0]) for n, one in measured.items()}
    return Comparison(scores, measured[TRAINED].sizes)


def _tables(
    backbone: Backbone, settings: KNN, store: Path | None
) -> dict[str, Callable[[Source], FeatureTable]]:
    """What turns images into features, by the name of its rows."""
    how: dict[str, Any] = {"batch": settings.batch, "workers": settings.workers}
    through = partial(extract, precision=settings.precision, store=store, **how)
    tables: dict[str, Callable[[Source], FeatureTable]] = {
        name: partial(through, network, title=f"{name} network")
        for name, network in networks(backbone, settings).items()
    }
    own = backbone.preprocessing
    raw = partial(pixels, mean=own.mean, std=own.std, **how)
    return tables | ({"pixels": raw} if settings.baseline else {})


def _votes(
    tables: Callable[[Source], FeatureTable],
    banks: Mapping[str, Source],
    queries: Source | None,
    settings: KNN,
    device: torch.device,
) -> dict[str, Measurement]:
    asked = None if queries is None else tables(queries)
    found = {}
    for name, bank in banks.items():
        voting = tables(bank)
        votes = votes_of(voting, asked, settings.k, settings.temperature, device)
        used = [voting] if asked is None else [voting, asked]
        skipped = sum(len(one.skipped) for one in used)
        sizes = {"bank": len(voting), "queries": len(used[-1]), "skipped": skipped}
        named = [*(voting.classes or []), *(used[-1].classes or [])]
        names = list(dict.fromkeys(named)) if voting.classes and used[-1].classes else None
        labels = votes.classes.tolist()
        found[name] = Measurement(votes, [names[n] if names else str(n) for n in labels], sizes)
    return found


def _rows(measured: Mapping[str, Mapping[str, Measurement]]) -> dict[str, dict[int, Accuracy]]:
    rows = {}
    for name, by_bank in measured.items():
        for bank, one in by_bank.items():
            temperatures = one.votes.temperatures
            for t in temperatures:
                words = (
                    [name] + [bank] * (len(by_bank) > 1) + [f"T = {t:g}"] * (len(temperatures) > 1)
                )
                rows[", ".join(words)] = one.votes.accuracies(t)
    return rows


def _table(
    found: Mapping[str, Mapping[int, Accuracy]], sizes: Mapping[str, int], settings: KNN
) -> Table:
    how = f"{sizes['queries']} queries" if settings.queries else "leave-one-out"
    temperatures = ", ".join(f"{t:g}" for t in settings.temperature)
    cells = {
        name: [f"{score.top1:.1f} / {score.top5:.1f}" for score in scores.values()]
        for name, scores in found.items()
    }
    return table(
        f"k-NN accuracy, top-1 / top-5 in %\n{how}, {sizes['bank']} images in the bank, "
        f"T = {temperatures}",
        ["features", *(f"k = {n}" for n in next(iter(found.values())))],
        cells,
    )


def _confused(one: Measurement, settings: KNN) -> dict[str, Any]:
    """Write the confusion matrix, print the pairs that are confused most; what JSON holds of it."""
    by = {(t, k): s for t in one.votes.temperatures for k, s in one.votes.accuracies(t).items()}
    temperature, k = max(by, key=lambda key: by[key].top1)
    counts = one.votes.confusion(k, temperature)
    images, right = counts.sum(dim=1), counts.diagonal()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "images", "top1", *(f"taken for {name}" for name in one.names)])
    for name, n, hit, row in zip(one.names, images.tolist(), right.tolist(), counts, strict=True):
        writer.writerow([name, n, f"{100 * hit / n:.2f}" if n else "", *row.tolist()])
    path = (settings.out or beside(settings.weights, "knn")).with_suffix(".confusion.csv")
    atomic_write(path, text.getvalue())
    wrong = counts - torch.diag(right)
    pairs = [divmod(int(place), len(counts)) for place in wrong.flatten().argsort(descending=True)]
    cells = {
        f"{one.names[own]} as {one.names[other]}": [
            str(int(wrong[own, other])),
            f"{100 * int(wrong[own, other]) / int(images[own]):.1f}",
        ]
        for own, other in pairs[:PAIRS]
        if wrong[own, other] > 0
    }
    title = f"Most confused, k = {k}, T = {temperature:g}"
    Console().print(table(title, ["class", "images", "% of its class"], cells))
    accuracy = {
        name: 100 * hit / n
        for name, hit, n in zip(one.names, right.tolist(), images.tolist(), strict=True)
        if n
    }
    return {"by_class": {"k": k, "temperature": temperature, "top1": accuracy}}
