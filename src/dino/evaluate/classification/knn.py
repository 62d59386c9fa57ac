"""Weighted nearest neighbours on frozen features (paper section 3.2 and appendix F.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
from dino.evaluate.features.extractor import extract
from dino.evaluate.features.raw_pixels import raw_pixels
from dino.evaluate.features.table import (
    FeatureTable,
    Subset,
    labels_in,
    labels_of,
    of_known_classes,
)
from dino.files import atomic_csv
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import Precision, pick_device, process_group
from dino.weights.load import untrained_like

TASK = "k-NN"

PAIRS = 10
"""Confused classes that are printed."""


def votes_of(
    bank: FeatureTable,
    queries: FeatureTable | None,
    k: Sequence[int] = K,
    temperatures: Sequence[float] = (TEMPERATURE,),
    device: torch.device | str | None = None,
) -> Votes:
    """`knn_classifier.vote` on tables; without queries, leave-one-out on the bank.

    Classes of the two tables are matched by name where both have names.
    """
    bank_labels = labels_of(bank, TASK)
    truth = bank_labels if queries is None else labels_in(bank.classes, queries, TASK)
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


def answerable(queries: Source | None, bank: Source) -> Source | None:
    """The queries whose class the bank has; a warning counts the others.

    Raises:
        UserError: if a source has no labels, or no class occurs in both.
    """
    known = labels_of(bank, TASK).tolist()
    return None if queries is None else of_known_classes(queries, bank.classes, known, TASK)


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
        UserError: if a source has no labels, or no class occurs in both.
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
        self.bank = spread(bank, limit)
        self.queries = answerable(queries and spread(queries, limit), self.bank)
        self.k, self.temperature = tuple(k), temperature
        self.extract = partial(
            extract, batch=batch, workers=workers, precision=precision, title="k-NN"
        )

    @property
    def asked(self) -> int:
        """Images that are classified."""
        return len(self.bank if self.queries is None else self.queries)

    def run(self, backbone: Backbone) -> dict[str, float]:
        """Top-1 accuracy in percent, for example `{"k10": 61.2, "k20": 62.0}`."""
        queries = None if self.queries is None else self.extract(backbone, self.queries)
        bank, device = self.extract(backbone, self.bank), next(backbone.parameters()).device
        votes = votes_of(bank, queries, self.k, (self.temperature,), device)
        accuracies = votes.accuracies(self.temperature)
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
    """Also write the accuracy of each class and its confusions (CSV), for the first bank and the
    best k and temperature."""
    batch: int = 64
    """Images at a time."""


def run(settings: KNN) -> dict[str, dict[int, Accuracy]]:
    """`dino evaluate knn`: one table, and JSON with its provenance.

    Returns:
        Accuracies by k for each network ("trained", with `baseline` "untrained" and "pixels"); the
        bank or temperature is appended to the name where there are several.

    Raises:
        UserError: for weights or data that do not exist, have no classes or none in common.
    """
    usable_k(settings.k, max(settings.k, default=0))  # before the work
    data, queried = use_splits(settings.data, settings.queries)
    named = None if queried is None else str(queried)
    settings = replace(settings, data=str(data), queries=named)
    path, device = command.destination("knn", settings), pick_device(settings.device)
    with process_group(device) as here:
        networks = settings.networks(device)
        pixels = networks[command.TRAINED].preprocessing.pixels
        banks = {data: open_source(data, pixels) for data in (settings.data, *settings.banks)}
        queries = None if settings.queries is None else open_source(settings.queries, pixels)
        pairs = {name: (bank, answerable(queries, bank)) for name, bank in banks.items()}
        store = settings.extraction()["store"]
        measured = {
            name: _measure(tables, pairs, settings, device)
            for name, tables in _tables(networks, settings, store).items()
        }
        scores = _by_name(measured)
        if here.main:
            first = measured[command.TRAINED][settings.data]
            about: dict[str, Any] = {**first.sizes, "leave_one_out": queries is None}
            if queries is not None:
                about["left_out"] = len(queries) - len(pairs[settings.data][1] or ())
            Console().print(_table(scores, first.sizes, settings))
            if settings.confusion:
                about |= _confusion(first, path.with_suffix(".confusion.csv"))
            if max(settings.k) > max(first.votes.k):
                clipped = f"k beyond the bank was clipped to {max(first.votes.k)}"
                Console().print(clipped, style="yellow")
            rows = {
                name: {f"k{n}": score._asdict() for n, score in by_k.items()}
                for name, by_k in scores.items()
            }
            content = {"knn": rows, **about, "networks": command.identities(networks)}
            command.write("knn", content, networks[command.TRAINED], settings)
    return scores


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


def compare(
    backbone: Backbone, bank: Source, queries: Source | None = None, *, settings: KNN
) -> tuple[dict[str, dict[int, Accuracy]], dict[str, int]]:
    """Measure the network and, if `settings.baseline`, its untrained twin and raw pixels.

    Nothing is cached; of several temperatures only the first is used.

    Returns:
        Accuracies by k of "trained", "untrained" and "pixels"; and `Measurement.sizes`.
    """
    device, networks = next(backbone.parameters()).device, {command.TRAINED: backbone}
    if settings.baseline:
        networks[command.UNTRAINED] = untrained_like(backbone)
    pairs = {"": (bank, answerable(queries, bank))}
    measured = {
        name: _measure(tables, pairs, settings, device)[""]
        for name, tables in _tables(networks, settings, None).items()
    }
    scores = {n: one.votes.accuracies(settings.temperature[0]) for n, one in measured.items()}
    return scores, measured[command.TRAINED].sizes


def _tables(
    networks: Mapping[str, Backbone], settings: KNN, store: Path | None
) -> dict[str, Callable[[Source], FeatureTable]]:
    """Functions from images to features, by the name of their rows."""
    options: dict[str, Any] = {"batch": settings.batch, "workers": settings.workers}
    tables: dict[str, Callable[[Source], FeatureTable]] = {
        name: partial(
            extract,
            network,
            precision=settings.precision,
            store=store,
            title=f"{name} network",
            **options,
        )
        for name, network in networks.items()
    }
    if settings.baseline:
        transform = networks[command.TRAINED].preprocessing
        tables["pixels"] = partial(raw_pixels, mean=transform.mean, std=transform.std, **options)
    return tables


def _measure(
    tables: Callable[[Source], FeatureTable],
    pairs: Mapping[str, tuple[Source, Source | None]],
    settings: KNN,
    device: torch.device,
) -> dict[str, Measurement]:
    """The votes of each bank on its queries, by its name."""
    tested: dict[int, FeatureTable] = {}  # by source: banks mostly share their queries
    found = {}
    for name, (bank_images, images) in pairs.items():
        if images is not None and id(images) not in tested:
            tested[id(images)] = tables(images)
        queries, bank = tested.get(id(images)), tables(bank_images)
        votes = votes_of(bank, queries, settings.k, settings.temperature, device)
        used = [bank] if queries is None else [bank, queries]
        skipped = sum(len(one.skipped) for one in used)
        sizes = {"bank": len(bank), "queries": len(used[-1]), "skipped": skipped}
        names = list(dict.fromkeys([*(bank.classes or []), *(used[-1].classes or [])]))
        named = bank.classes and used[-1].classes
        labels = [names[n] if named else str(n) for n in votes.classes.tolist()]
        found[name] = Measurement(votes, labels, sizes)
    return found


def _by_name(measured: Mapping[str, Mapping[str, Measurement]]) -> dict[str, dict[int, Accuracy]]:
    rows = {}
    for name, by_bank in measured.items():
        for bank, one in by_bank.items():
            temperatures = one.votes.temperatures
            for t in temperatures:
                parts = [bank] * (len(by_bank) > 1) + [f"T = {t:g}"] * (len(temperatures) > 1)
                rows[", ".join([name, *parts])] = one.votes.accuracies(t)
    return rows


def _table(
    scores: Mapping[str, Mapping[int, Accuracy]], sizes: Mapping[str, int], settings: KNN
) -> Table:
    queries = f"{sizes['queries']} queries" if settings.queries else "leave-one-out"
    temperatures = ", ".join(f"{t:g}" for t in settings.temperature)
    cells = {name: [str(score) for score in by_k.values()] for name, by_k in scores.items()}
    return command.table(
        f"k-NN accuracy, top-1 / top-5 in %\n{queries}, {sizes['bank']} images in the bank, "
        f"T = {temperatures}",
        ["features", *(f"k = {n}" for n in next(iter(scores.values())))],
        cells,
    )


def _confusion(one: Measurement, path: Path) -> dict[str, Any]:
    """Write the confusion matrix, print the most confused pairs; returns their part of the JSON."""
    by = {(t, k): s for t in one.votes.temperatures for k, s in one.votes.accuracies(t).items()}
    temperature, k = max(by, key=lambda key: by[key].top1)
    counts = one.votes.confusion(k, temperature)
    images, right = counts.sum(dim=1).tolist(), counts.diagonal()
    accuracy = {
        name: 100 * hit / n
        for name, hit, n in zip(one.names, right.tolist(), images, strict=True)
        if n
    }
    header = ["class", "images", "top1", *(f"taken for {name}" for name in one.names)]
    rows = (
        [name, n, f"{accuracy[name]:.2f}" if n else "", *row]
        for name, n, row in zip(one.names, images, counts.tolist(), strict=True)
    )
    atomic_csv(path, header, rows)
    wrong = counts - torch.diag(right)
    pairs = [divmod(int(place), len(counts)) for place in wrong.flatten().argsort(descending=True)]
    cells = {
        f"{one.names[own]} as {one.names[other]}": [
            str(int(wrong[own, other])),
            f"{100 * int(wrong[own, other]) / images[own]:.1f}",
        ]
        for own, other in pairs[:PAIRS]
        if wrong[own, other] > 0
    }
    title = f"Most confused, k = {k}, T = {temperature:g}"
    Console().print(command.table(title, ["class", "images", "% of its class"], cells))
    return {"by_class": {"k": k, "temperature": temperature, "top1": accuracy}}
