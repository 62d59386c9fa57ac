"""The linear probe: a linear classifier on frozen features (paper section 4.1, appendix F.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from dino.data.sources.open import Source, open_source
from dino.evaluate import command as results
from dino.evaluate.classification import linear_classifier as classifiers
from dino.evaluate.classification.feature_batches import TASK, Batches, FromCrops, FromTables
from dino.evaluate.classification.linear_classifier import Classifier, Sweep
from dino.evaluate.classification.linear_training import (
    Layers,
    Mirrored,
    Score,
    layers_of,
    scores,
    train,
)
from dino.evaluate.command import TRAINED, Measured
from dino.evaluate.epoch_checkpoint import Unfinished
from dino.evaluate.features.cache import described, files_digest
from dino.evaluate.features.table import FeatureTable, labels_of, matched_labels
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group, ranks
from dino.weights.load import fingerprint, load

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The paper sweeps, but does not say over what; these cover the published logs (.001 to .3)."""

DOES_NOT_DEFINE = (
    "weights",
    "data",
    "val",
    "workers",
    "device",
    "store",
    "out",
    "baseline",
    "forward",
)
"""Settings that a training which goes on may change, or that are known by their content."""


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Linear(Measured):
    """Train a linear classifier on frozen features, with a sweep of learning rates (app. F.2)."""

    data: str | None = None
    """Images to train on: a folder with one sub-folder for each class, or a list with labels.
    Not needed with --classifier."""
    val: str
    """Images to test on, laid out like the others."""
    mode: Literal["augmented", "cached"] = "augmented"
    """augmented: random crops through the network in every epoch, as in the paper. cached: the
    features of the central crops, computed once; far faster, a little less accurate."""
    mirror: bool = False
    """Cached mode: also compute the mirrored pictures, and take either in each epoch."""
    blocks: int | None = None
    """CLS tokens of so many last blocks; by default 4, for ViT-B and convnets 1."""
    average: bool | None = None
    """Add the average of the last block's patch tokens; by default for ViT-B only."""
    rates: tuple[float, ...] = RATES
    """Learning rates per 256 images; all are trained side by side."""
    epochs: int = 100
    """Passes over the images; the learning rates follow a cosine to 0."""
    batch: int = 1024
    """Images of a step, over all ranks."""
    forward: int = 64
    """Images at a time through the network, on each rank; it does not change the result."""
    seed: int = 0
    """Of the initial weights, the orders and the crops."""
    classifier: Path | None = None
    """Do not train: measure this classifier, which the command wrote or the authors published."""


def run(settings: Linear) -> dict[str, Any]:
    """`dino evaluate linear`: one table, the result as JSON, and the classifier.

    The paper reports the best epoch on the test images, and so chooses by them; so do the columns
    "best epoch" and the choice of the learning rate here. The last epoch stands beside it.

    Returns:
        What was written: "linear" holds, for "trained" and with `baseline` for "untrained", one
        entry a learning rate.

    Raises:
        UserError: for weights, data or a classifier that are not there or do not fit.
    """
    _check(settings)
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load(settings.weights, device)
        if settings.classifier is not None:
            content, table = _measure(backbone, settings)
        else:
            content, table = _train(backbone, settings)
        if here.main:
            results.write("linear", content, backbone, settings)
            Console().print(table)
    return content


def _check(settings: Linear) -> None:
    if (settings.data is None) == (settings.classifier is None):
        raise UserError("give either --data, to train on, or --classifier, to measure")
    if settings.classifier is not None and settings.baseline:
        raise UserError("a classifier belongs to one network: leave out --baseline")
    if not settings.rates or min(settings.rates) <= 0:
        raise UserError(f"--rates must be one or more positive numbers, not {settings.rates}")
    for name in ("epochs", "batch", "forward"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(settings, name)}")
    if settings.mirror and settings.mode != "cached":
        raise UserError("--mirror belongs to --mode cached: random crops are mirrored anyway")


@dataclass(frozen=True)
class Probe:
    """A trained sweep.

    Attributes:
        layers: the features it saw.
        sweep: the classifiers after the last epoch.
        rates: the learning rate of each.
        history: the scores of each after every epoch.
    """

    layers: Layers
    sweep: Sweep
    rates: tuple[float, ...]
    history: list[list[Score]]

    @property
    def chosen(self) -> int:
        """The place of the learning rate that is best after the last epoch."""
        return max(range(len(self.rates)), key=lambda place: self.history[-1][place])

    def best_epoch(self, place: int) -> int:
        """The epoch, from 0, after which a classifier was best."""
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch][place].top1)

    def summary(self) -> list[dict[str, Any]]:
        """One entry a learning rate, for JSON."""
        return [
            {
                "rate": rate,
                "last": self.history[-1][place]._asdict(),
                "best": {
                    "epoch": self.best_epoch(place) + 1,
                    **self.history[self.best_epoch(place)][place]._asdict(),
                },
                "top1_by_epoch": [scores[place].top1 for scores in self.history],
            }
            for place, rate in enumerate(self.rates)
        ]


def _train(backbone: Backbone, settings: Linear) -> tuple[dict[str, Any], Table]:
    pixels = backbone.preprocessing.pixels
    source, val = (open_source(data, pixels) for data in (settings.data, settings.val))
    labels_of(source, TASK), labels_of(val, TASK)
    path = settings.out or results.beside(settings.weights, "linear")
    probes, tested = {}, 0
    for name, network in results.networks(backbone, settings).items():
        unfinished = path.with_suffix(f".{name}.unfinished.safetensors")
        probes[name], tested = _probe(network, source, val, settings, unfinished)
    if ranks().main:
        _save(probes[TRAINED], source, backbone, settings, path.with_suffix(".safetensors"))
    content = {
        "linear": {name: probe.summary() for name, probe in probes.items()},
        "chosen": {name: probe.rates[probe.chosen] for name, probe in probes.items()},
        "features": asdict(probes[TRAINED].layers),
        "images": {"train": len(source), "val": tested},
    }
    return content, _table(probes, tested)


def _probe(
    network: Backbone, source: Source, val: Source, settings: Linear, unfinished: Path
) -> tuple[Probe, int]:
    """Train the sweep on a network; and the number of images it was tested on."""
    device = next(network.parameters()).device
    layers = layers_of(network, settings.blocks, settings.average)
    test = _features(network, val, layers, settings)
    truth = matched_labels(test, source.classes, TASK)
    labels = labels_of(source, TASK)
    classes = len(source.classes) if source.classes else int(labels.max()) + 1
    sweep = Sweep(
        test.features.shape[1], classes, settings.rates, seed=settings.seed, device=device
    )
    defining = {k: v for k, v in asdict(settings).items() if k not in DOES_NOT_DEFINE}
    about = [fingerprint(network), files_digest(source), labels.tolist(), str(defining)]
    saved = Unfinished(unfinished, about)
    history = train(
        sweep,
        _batches(network, source, layers, settings),
        lambda: scores(sweep, test.features, truth, device),
        settings.epochs,
        settings.batch,
        saved,
    )
    saved.forget()
    return Probe(layers, sweep, settings.rates, history), len(test)


def _features(
    network: Backbone, source: Source, layers: Layers, settings: Linear, mirror: bool = False
) -> FeatureTable:
    transform = Mirrored(network.preprocessing) if mirror else network.preprocessing
    descriptor = layers.descriptor(transform)
    return described(network, source, descriptor, batch=settings.forward, **settings.extraction())


def _batches(network: Backbone, source: Source, layers: Layers, settings: Linear) -> Batches:
    if settings.mode == "cached":
        mirrored = (False, True) if settings.mirror else (False,)
        tables = [_features(network, source, layers, settings, mirror) for mirror in mirrored]
        device = next(network.parameters()).device
        return FromTables(tables, settings.batch, settings.seed, device)
    return FromCrops(
        network,
        layers,
        source,
        batch=settings.batch,
        seed=settings.seed,
        forward=settings.forward,
        workers=settings.workers,
        precision=settings.precision,
    )


def _save(probe: Probe, source: Source, backbone: Backbone, settings: Linear, path: Path) -> None:
    rate = probe.rates[probe.chosen]
    about = {**asdict(probe.layers), "sha256": fingerprint(backbone), "mode": settings.mode}
    about |= {"rate": rate, "epochs": settings.epochs, "top1": probe.history[-1][probe.chosen].top1}
    weight, bias = (part[probe.chosen] for part in (probe.sweep.weight, probe.sweep.bias))
    classifiers.save(Classifier(weight, bias, source.classes, about), path)


def _measure(backbone: Backbone, settings: Linear) -> tuple[dict[str, Any], Table]:
    """Score a classifier from a file."""
    assert settings.classifier is not None
    layers = layers_of(backbone, settings.blocks, settings.average)
    found = classifiers.load(settings.classifier, average=layers.average)
    if found.about:
        layers = Layers(found.about["blocks"], found.about["average"])
        if found.about["sha256"] != fingerprint(backbone):
            raise UserError(
                f"{settings.classifier} was trained on the features of other weights than "
                f"{settings.weights}"
            )
    val = open_source(settings.val, backbone.preprocessing.pixels)
    _check_classes(found, val, settings)
    test = _features(backbone, val, layers, settings)
    width, wanted = test.features.shape[1], found.weight.shape[1]
    if width != wanted:
        raise UserError(
            f"{settings.classifier} takes {wanted} numbers, the features have {width}: "
            "set --blocks and --average as it was trained"
        )
    truth = matched_labels(test, found.classes, TASK)
    device = next(backbone.parameters()).device
    (score,) = scores(found, test.features, truth, device)
    table = results.table(
        f"Linear accuracy of {settings.classifier} in %, {len(test)} images",
        ("features", "top-1", "top-5"),
        {TRAINED: (f"{score.top1:.1f}", f"{score.top5:.1f}")},
    )
    content = {"classifier": score._asdict(), "features": asdict(layers)}
    return {**content, "images": {"val": len(test)}}, table


def _check_classes(found: Classifier, val: Source, settings: Linear) -> None:
    labels = labels_of(val, TASK)
    known = len(val.classes) if val.classes else int(labels.max()) + 1
    if found.classes is None and known != len(found.bias):
        raise UserError(
            f"{settings.classifier} knows {len(found.bias)} classes and not their names, "
            f"{settings.val} has {known}: they cannot be matched"
        )


def _table(probes: dict[str, Probe], tested: int) -> Table:
    def cells(score: Score) -> str:
        return f"{score.top1:.1f} / {score.top5:.1f}"

    rows = {
        f"{name}, {rate:g}{' *' if place == probe.chosen else ''}": (
            cells(probe.history[-1][place]),
            cells(probe.history[probe.best_epoch(place)][place]),
            str(probe.best_epoch(place) + 1),
        )
        for name, probe in probes.items()
        for place, rate in enumerate(probe.rates)
        if name == TRAINED or place == probe.chosen
    }
    layers = probes[TRAINED].layers
    what = f"CLS of {layers.blocks} block(s)" + " and average patch" * layers.average
    return results.table(
        f"Linear accuracy, top-1 / top-5 in %\n{what}, {tested} images; best epochs and the "
        "rate with * were chosen by these images",
        ("features, rate per 256", "last epoch", "best epoch", "which"),
        rows,
    )
