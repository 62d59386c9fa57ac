"""Weighted nearest neighbours on frozen features (paper section 3.2 and appendix F.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from rich.table import Table

from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate import command
from dino.evaluate.classification.knn_classifier import (
    TEMPERATURE,
    Accuracy,
    K,
    Votes,
    usable_k,
    vote,
)
from dino.evaluate.shared_images import paths_of
from dino.features.command import Count, Images, OptionalImages, number_table
from dino.features.extractor import extract
from dino.features.raw_pixels import raw_pixels
from dino.features.table import (
    FeatureTable,
    Subset,
    ignored_files,
    labels_in,
    labels_of,
    of_known_classes,
)
from dino.files import atomic_csv
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated
from dino.weights.load import untrained_like

TASK = "k-NN"

MOST_CONFUSED = 10
"""Pairs of classes that are printed."""


class Measurement(NamedTuple):
    """Votes of one bank.

    Attributes:
        votes: for each query.
        names: of the classes that the votes count.
        sizes: images that served as "bank" and as "queries", and how many were "skipped" because
            they cannot be used.
    """

    votes: Votes
    names: list[str]
    sizes: dict[str, int]


def measure(
    bank: FeatureTable,
    queries: FeatureTable | None,
    k: Sequence[int] = K,
    temperatures: Sequence[float] = (TEMPERATURE,),
    device: torch.device | str | None = None,
) -> Measurement:
    """`knn_classifier.vote` on tables; without queries, leave-one-out on the bank.

    Classes of the two tables are paired by name where both have names.
    """
    tables = [bank] if queries is None else [bank, queries]
    train = (bank.features, labels_of(bank, TASK))
    test = (tables[-1].features, labels_in(bank.classes, tables[-1], TASK))
    options: dict[str, Any] = {"leave_one_out": queries is None, "device": device}
    votes = vote(*train, *test, k, temperatures, **options)
    names = list(dict.fromkeys(name for table in tables for name in table.classes or ()))
    named = all(table.classes for table in tables)
    labels = [names[n] if named else str(n) for n in votes.classes.tolist()]
    skipped = sum(len(table.skipped) for table in tables)
    sizes = {"bank": len(bank), "queries": len(tables[-1]), "skipped": skipped}
    return Measurement(votes, labels, sizes)


def of_bank_classes(queries: Source | None, bank: Source) -> Source | None:
    """The queries whose class the bank has; a warning counts the others.

    Raises:
        UserError: if a source has no labels, or no class occurs in both.
    """
    known = labels_of(bank, TASK).tolist()
    return None if queries is None else of_known_classes(queries, bank.classes, known, TASK)


class KNNEvaluation:
    """k-NN during training: an `Evaluation` (see `dino.evaluate.protocol`).

    Without queries it is leave-one-out on the bank. Of each source at most `limit` images are used,
    evenly spread over it.

    Raises:
        UserError: if a source has no labels, or no class occurs in both.
    """

    name = "knn"

    def __init__(
        self,
        bank: Source,
        queries: Source | None = None,
        *,
        k: Sequence[int] = (10, 20),
        limit: int | None = None,
    ) -> None:
        self.bank, self.k = spread(bank, limit), tuple(k)
        self.queries = of_bank_classes(queries and spread(queries, limit), self.bank)

    @property
    def num_queries(self) -> int:
        """Number of images that are classified."""
        return len(self.bank if self.queries is None else self.queries)

    @property
    def num_images(self) -> int:
        """Number of images of bank and queries."""
        return len(self.bank) + (0 if self.queries is None else len(self.queries))

    def run(self, backbone: Backbone) -> dict[str, float]:
        """Top-1 accuracy in percent, for example `{"k10": 61.2, "k20": 62.0}`."""
        queries = None if self.queries is None else extract(backbone, self.queries, title=TASK)
        bank, device = extract(backbone, self.bank, title=TASK), next(backbone.parameters()).device
        accuracies = measure(bank, queries, self.k, device=device).votes.accuracies(TEMPERATURE)
        return {f"k{n}": accuracy.top1 for n, accuracy in accuracies.items()}


def spread(source: Source, limit: int | None) -> Source:
    """At most `limit` images of a source, evenly spread over it; None for all of them."""
    if limit is None or len(source) <= limit:
        return source
    return Subset(source, [len(source) * i // limit for i in range(limit)])


# ------------------------------------------------------------------------------------ command
@dataclass(frozen=True, kw_only=True)
class KNN(command.FeatureEvaluationSettings):
    """Classify images by their nearest neighbours among features (paper section 3.2)."""

    renamed: ClassVar[dict[str, str]] = {"val": "queries"}

    data: Images
    """The bank: a folder with one sub-folder for each class, a list with labels, or demo."""
    queries: OptionalImages = None
    """Images to classify, laid out like the bank; without it each image of the bank in turn is
    classified by all others."""
    banks: tuple[str, ...] = ()
    """More banks, each measured like the first."""
    k: Annotated[tuple[int, ...], Range(low=1)] = K
    """How many neighbours vote; one or more numbers."""
    temperature: Annotated[tuple[float, ...], Range(above=0)] = (TEMPERATURE,)
    """Of the votes, exp(similarity / temperature); one or more numbers."""
    baseline: bool = False
    """Also measure the untrained network and raw pixels."""
    confusion: bool = False
    """Also write the accuracy of each class and its confusions (CSV), for the first bank and the
    best k and temperature."""
    batch: Count = 64
    """Images at a time."""


def run(settings: KNN) -> dict[str, dict[int, Accuracy]]:
    """`dino evaluate knn`: one table, and JSON with its provenance.

    Returns:
        Accuracies by k for each network ("trained", with `baseline` "untrained" and "pixels"); the
        bank or temperature is appended to the name where there are several.

    Raises:
        UserError: for weights or data that do not exist, have no classes or none in common.
    """
    data, queries_name = use_splits(settings.data, settings.queries)
    settings = validated(replace(settings, data=data, queries=queries_name))
    usable_k(settings.k, max(settings.k, default=0))  # before the work
    names = (settings.data, *settings.banks)
    with command.evaluation_run("knn", settings, *names, settings.queries) as started:
        banks = [open_source(name, started.pixels) for name in names]
        queries = (
            None if settings.queries is None else open_source(settings.queries, started.pixels)
        )
        pairs = [(bank, of_bank_classes(queries, bank)) for bank in banks]
        if queries is None:
            started.compare_images(paths_of(banks[0]), None)
        else:
            started.compare_images(paths_of(*banks), paths_of(queries))
        store = settings.extraction()["store"]
        measured = _measure_all(started.networks, pairs, settings, store)
        first, scores = measured[command.TRAINED][0], _by_row(measured, settings)
        content: dict[str, Any] = {
            "knn": {
                name: {f"k{n}": score.percentages() for n, score in by_k.items()}
                for name, by_k in scores.items()
            },
            **first.sizes,
            "leave_one_out": queries is None,
            "ignored_files": ignored_files(*banks, queries),
        }
        if queries is not None:
            content["left_out"] = len(queries) - len(pairs[0][1] or ())
        rows = _by_k(scores)
        printed: list[Table | str] = [_table(rows, first.sizes, settings)]
        files = []
        if settings.confusion and ranks().main:
            files = [started.path.with_suffix(".confusion.csv")]
            content["by_class"], confused = _confusion(first, files[0])
            printed.append(confused)
        if max(settings.k) > max(first.votes.k):
            printed.append(f"k beyond the bank was clipped to {max(first.votes.k)}")
        started.report(
            content,
            *printed,
            images=first.sizes["queries"],
            scores={
                f"top-1, k = {k}": {name: score.score() for name, score in of.items()}
                for k, of in rows.items()
            },
            files=files,
        )
    return scores


def compare(
    backbone: Backbone, bank: Source, queries: Source | None = None, *, settings: KNN
) -> tuple[dict[str, dict[int, Accuracy]], dict[str, int]]:
    """Measure the network and, if `settings.baseline`, its untrained twin and raw pixels.

    Nothing is cached; of several temperatures only the first is used.

    Returns:
        Accuracies by k of "trained", "untrained" and "pixels"; and `Measurement.sizes`.
    """
    networks = {command.TRAINED: backbone}
    if settings.baseline:
        networks[command.UNTRAINED] = untrained_like(backbone)
    measured = _measure_all(networks, [(bank, of_bank_classes(queries, bank))], settings)
    scores = {
        name: of.votes.accuracies(settings.temperature[0]) for name, (of,) in measured.items()
    }
    return scores, measured[command.TRAINED][0].sizes


def _measure_all(
    networks: Mapping[str, Backbone],
    pairs: Sequence[tuple[Source, Source | None]],
    settings: KNN,
    store: Path | None = None,
) -> dict[str, list[Measurement]]:
    """By the name of the features: the votes of each pair of a bank and its queries."""
    trained = networks[command.TRAINED]
    transform, device = trained.preprocessing, next(trained.parameters()).device
    options: dict[str, Any] = {"batch": settings.batch, "workers": settings.workers}
    extractors = {
        name: partial(extract, network, precision=settings.precision, store=store, title=name)
        for name, network in networks.items()
    }
    if settings.baseline:
        extractors["pixels"] = partial(raw_pixels, mean=transform.mean, std=transform.std)
    measured: dict[str, list[Measurement]] = {}
    for name, extractor in extractors.items():
        features = lru_cache(2)(partial(extractor, **options))  # banks mostly share their queries
        measured[name] = []
        for bank, queries in pairs:
            tested = None if queries is None else features(queries)
            measured[name].append(
                measure(features(bank), tested, settings.k, settings.temperature, device)
            )
    return measured


def _by_row(
    measured: Mapping[str, Sequence[Measurement]], settings: KNN
) -> dict[str, dict[int, Accuracy]]:
    """Accuracies by the name of their row: the features, and the bank or T if there are several."""
    rows = {}
    banks = (settings.data, *settings.banks)
    for name, by_bank in measured.items():
        for (bank, one), t in product(zip(banks, by_bank, strict=True), settings.temperature):
            parts = [bank] * (len(banks) > 1) + [f"T = {t:g}"] * (len(settings.temperature) > 1)
            rows[", ".join([name, *parts])] = one.votes.accuracies(t)
    return rows


def _by_k(scores: Mapping[str, Mapping[int, Accuracy]]) -> dict[int, dict[str, Accuracy]]:
    """Accuracies by k, ascending, then by the name of their row; small banks lack a large k."""
    ks = sorted({k for by_k in scores.values() for k in by_k})
    return {k: {name: by_k[k] for name, by_k in scores.items() if k in by_k} for k in ks}


def _table(
    rows: Mapping[int, Mapping[str, Accuracy]], sizes: Mapping[str, int], settings: KNN
) -> Table:
    queries = f"{sizes['queries']} queries" if settings.queries else "leave-one-out"
    temperatures = ", ".join(f"{t:g}" for t in settings.temperature)
    return number_table(
        f"k-NN accuracy in %, ± standard error\n{queries}, bank of {sizes['bank']}, "
        f"T = {temperatures}",
        ["features", "top-1", "top-5"],
        {
            f"k = {k}, {name}": str(score).split(" / ")
            for k, by_name in rows.items()
            for name, score in by_name.items()
        },
    )


def _confusion(of: Measurement, path: Path) -> tuple[dict[str, Any], Table]:
    """Write the confusion matrix; returns the JSON and the table of the most confused pairs."""
    votes = of.votes
    temperature, k = max(
        product(votes.temperatures, votes.k), key=lambda key: votes.accuracies(key[0])[key[1]].top1
    )
    counts = votes.confusion(k, temperature).numpy()
    images = counts.sum(axis=1)
    accuracy = {
        name: 100 * float(counts[i, i]) / n
        for i, (name, n) in enumerate(zip(of.names, images.tolist(), strict=True))
        if n
    }
    header = ["class", "images", "top1", *(f"taken for {name}" for name in of.names)]
    rows = (
        [name, n, f"{accuracy[name]:.2f}" if n else "", *row]
        for name, n, row in zip(of.names, images.tolist(), counts.tolist(), strict=True)
    )
    atomic_csv(path, header, rows)
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]
    cells = {
        f"{of.names[true]} as {of.names[predicted]}": [
            str(wrong[true, predicted]),
            f"{100 * wrong[true, predicted] / images[true]:.1f}",
        ]
        for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[true, predicted]
    }
    title = f"Most confused, k = {k}, T = {temperature:g}"
    table = number_table(title, ["class", "images", "% of its class"], cells)
    return {"k": k, "temperature": temperature, "top1": accuracy}, table
