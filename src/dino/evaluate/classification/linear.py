"""The linear probe: a linear classifier on frozen features (paper section 4.1, appendix F.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from rich.table import Table

from dino.data.sources.open import Source, open_source
from dino.evaluate import command
from dino.evaluate.classification import linear_classifier as classifiers
from dino.evaluate.classification.feature_batches import TASK, Batches, CropBatches, TableBatches
from dino.evaluate.classification.knn_classifier import Accuracy
from dino.evaluate.classification.linear_classifier import Classifier, Sweep
from dino.evaluate.classification.linear_training import Layers, layers_of, scores, train
from dino.evaluate.epoch_checkpoint import EpochCheckpoint
from dino.evaluate.results import file_name
from dino.evaluate.shared_images import paths_of
from dino.features.cache import files_digest
from dino.features.command import Count, Images, OptionalImages, Seed, number_table
from dino.features.extractor import extract
from dino.features.table import (
    FeatureTable,
    count_classes,
    ignored_files,
    labels_in,
    labels_of,
    of_known_classes,
    open_labelled,
)
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated
from dino.weights.load import fingerprint

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The paper does not state the rates of its sweep; these cover the published logs (.001 to .3)."""

DEFINING = ("precision", "mode", "blocks", "average", "rates", "epochs", "batch", "seed")
"""Settings that a stopped training must have in common with the one that continues it."""


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Linear(command.FeatureEvaluationSettings):
    """Train a linear classifier on frozen features, with a sweep of learning rates (app. F.2)."""

    renamed: ClassVar[dict[str, str]] = {"forward": "forward-batch"}

    data: OptionalImages = None
    """Images to train on: a folder with one sub-folder for each class, or a list with labels.
    Not needed with --classifier."""
    val: Images
    """Images to test on, laid out like those of --data."""
    mode: Literal["augmented", "cached"] = "augmented"
    """augmented: random crops through the network in every epoch, as in the paper. cached: the
    features of the central crops, computed once; far faster, a little less accurate."""
    blocks: Count | None = None
    """How many last blocks give their CLS token; by default 4, for ViT-B and convnets 1."""
    average: bool | None = None
    """Add the average of the last block's patch tokens; by default for ViT-B only."""
    rates: Annotated[tuple[float, ...], Range(above=0)] = RATES
    """Learning rates per 256 images; all are trained side by side."""
    epochs: Count = 100
    """Passes over the images; the learning rates decay to 0 along a cosine."""
    batch: Count = 1024
    """Images of a step, over all ranks."""
    forward_batch: Count = 64
    """Images at a time through the network, on each rank; it does not change the result."""
    seed: Seed = 0
    """Of the initial weights, the orders and the crops."""
    classifier: Path | None = None
    """Do not train, but measure this classifier: written by this command, or published."""


def run(settings: Linear) -> dict[str, Any]:
    """`dino evaluate linear`: one table, the result as JSON, and the classifier.

    As in the paper, "best epoch" and the learning rate are chosen on the test images; the last
    epoch is reported as well.

    Returns:
        The JSON without its provenance: "linear" holds one entry a learning rate for each network.

    Raises:
        UserError: for weights, data or a classifier that do not exist or do not fit.
    """
    settings = validated(settings)
    if (settings.data is None) == (settings.classifier is None):
        raise UserError("give either --data, to train on, or --classifier, to measure")
    if settings.classifier is not None and (settings.baseline or settings.compare):
        raise UserError("a classifier belongs to one network: omit --baseline and --compare")
    if not settings.rates:
        raise UserError("--rates must be one or more numbers")
    with command.evaluation_run("linear", settings, settings.data, settings.val) as started:
        if settings.data is not None:
            return _train(started, settings.data, settings)
        assert settings.classifier is not None
        return _measure(started, settings, settings.classifier)


@dataclass(frozen=True)
class Probe:
    """A trained sweep.

    Attributes:
        layers: the features.
        sweep: the classifiers after the last epoch.
        curves: for each learning rate, the accuracies after every epoch.
    """

    layers: Layers
    sweep: Sweep
    curves: dict[float, list[Accuracy]]

    @property
    def chosen(self) -> float:
        """The learning rate that is best after the last epoch."""
        return max(self.curves, key=lambda rate: self.curves[rate][-1])

    def summary(self) -> list[dict[str, Any]]:
        """One entry a learning rate, for JSON."""
        return [
            {
                "rate": rate,
                "last": curve[-1].percentages(),
                "best": {"epoch": best_epoch(curve) + 1, **curve[best_epoch(curve)].percentages()},
                "top1_by_epoch": [accuracy.top1 for accuracy in curve],
            }
            for rate, curve in self.curves.items()
        ]


def best_epoch(curve: Sequence[Accuracy]) -> int:
    """The first epoch, from 0, with the highest top-1 accuracy."""
    return max(range(len(curve)), key=lambda epoch: curve[epoch].top1)


def _train(started: command.EvaluationRun, data: str, settings: Linear) -> dict[str, Any]:
    source, val, counts = open_labelled(data, settings.val, started.pixels, TASK)
    started.compare_images(paths_of(source), paths_of(val))
    probes, tested = {}, 0
    for name, network in started.networks.items():
        unfinished = f".{file_name(name)}.unfinished.safetensors"
        checkpoint = started.path.with_suffix(unfinished)
        probes[name], tested = _probe(network, source, val, settings, checkpoint)
    trained = probes[command.TRAINED]
    file = started.path.with_suffix(".safetensors")
    if ranks().main:
        _save(trained, source, started.networks[command.TRAINED], settings, file)
    content = {
        "linear": {name: probe.summary() for name, probe in probes.items()},
        "chosen": {name: probe.chosen for name, probe in probes.items()},
        "features": asdict(trained.layers),
        "images": {"train": len(source), "val": tested, **counts},
    }
    last = {name: probe.curves[probe.chosen][-1].score() for name, probe in probes.items()}
    principal = {"top-1, last epoch": last}
    started.report(content, _table(probes, tested), images=tested, scores=principal, files=[file])
    return content


def _probe(
    network: Backbone, source: Source, val: Source, settings: Linear, unfinished: Path
) -> tuple[Probe, int]:
    """The trained sweep of a network, and the number of its test images."""
    device = next(network.parameters()).device
    layers = layers_of(network, settings.blocks, settings.average)
    test = _features(network, val, layers, settings)
    truth = labels_in(source.classes, test, TASK)
    labels, classes = labels_of(source, TASK), count_classes(source, TASK)
    inputs = test.features.shape[1]
    sweep = Sweep(inputs, classes, settings.rates, seed=settings.seed, device=device)
    defining = [str(getattr(settings, name)) for name in DEFINING]
    key = [fingerprint(network), files_digest(source), files_digest(val), labels.tolist(), defining]
    checkpoint = EpochCheckpoint(unfinished, key)
    with checkpoint.interruptible():
        history = train(
            sweep,
            _batches(network, source, layers, settings),
            lambda: scores(sweep, test.features, truth, device),
            settings.epochs,
            settings.batch,
            checkpoint,
        )
    checkpoint.delete()
    curves = map(list, zip(*history, strict=True))  # by learning rate instead of by epoch
    return Probe(layers, sweep, dict(zip(settings.rates, curves, strict=True))), len(test)


def _features(network: Backbone, source: Source, layers: Layers, settings: Linear) -> FeatureTable:
    options: dict[str, Any] = {"batch": settings.forward_batch, "memory_option": "--forward-batch"}
    return extract(network, source, layers.descriptor(network), **options, **settings.extraction())


def _batches(network: Backbone, source: Source, layers: Layers, settings: Linear) -> Batches:
    if settings.mode == "cached":
        device = next(network.parameters()).device
        table = _features(network, source, layers, settings)
        return TableBatches(table, settings.batch, settings.seed, device)
    names = ("batch", "seed", "forward_batch", "workers", "precision")
    return CropBatches(network, layers, source, **{name: getattr(settings, name) for name in names})


def _save(probe: Probe, source: Source, backbone: Backbone, settings: Linear, path: Path) -> None:
    about = {**asdict(probe.layers), "sha256": fingerprint(backbone), "mode": settings.mode}
    about |= {"rate": probe.chosen, "epochs": settings.epochs}
    about["top1"] = probe.curves[probe.chosen][-1].top1
    index = settings.rates.index(probe.chosen)
    weight, bias = probe.sweep.weight[index], probe.sweep.bias[index]
    classifiers.save(Classifier(weight, bias, source.classes, about), path)


def _measure(started: command.EvaluationRun, settings: Linear, path: Path) -> dict[str, Any]:
    """Score a classifier from a file."""
    backbone = started.networks[command.TRAINED]
    layers = layers_of(backbone, settings.blocks, settings.average)
    classifier = classifiers.load(path, average=layers.average)
    if classifier.about:
        layers = Layers(classifier.about["blocks"], classifier.about["average"])
        if classifier.about["sha256"] != fingerprint(backbone):
            raise UserError(
                f"{path} was trained on the features of other weights than {settings.weights}"
            )
    images = open_source(settings.val, backbone.preprocessing.pixels)
    known, present = len(classifier.bias), count_classes(images, TASK)
    if classifier.classes is None and known != present:
        raise UserError(
            f"{path} has {known} classes without names, {settings.val} has {present}: they cannot "
            "be matched"
        )
    val = of_known_classes(images, classifier.classes, range(known), TASK)
    test = _features(backbone, val, layers, settings)
    inputs, expected = test.features.shape[1], classifier.weight.shape[1]
    if inputs != expected:
        raise UserError(
            f"{path} takes {expected} numbers, the features have {inputs}: set --blocks and "
            "--average as in its training"
        )
    truth = labels_in(classifier.classes, test, TASK)
    (score,) = scores(classifier, test.features, truth, next(backbone.parameters()).device)
    rows = number_table(
        f"Linear accuracy of {path} in %, ± standard error, {len(test)} images",
        ("features", "top-1", "top-5"),
        {command.TRAINED: str(score).split(" / ")},
    )
    counts = {"left_out": len(images) - len(val), "ignored_files": ignored_files(images)}
    content: dict[str, Any] = {"classifier": score.percentages(), "features": asdict(layers)}
    content |= {"images": {"val": len(test), **counts}}
    principal = {"top-1": {command.TRAINED: score.score()}}
    started.report(content, rows, images=len(test), scores=principal)
    return content


def _table(probes: dict[str, Probe], tested: int) -> Table:
    rows = {
        f"{name}, {rate:g}{' *' if rate == probe.chosen else ''}": (
            str(curve[-1]),
            str(curve[best_epoch(curve)]),
            str(best_epoch(curve) + 1),
        )
        for name, probe in probes.items()
        for rate, curve in probe.curves.items()
        if name == command.TRAINED or rate == probe.chosen
    }
    layers = probes[command.TRAINED].layers
    what = f"CLS of {layers.blocks} block(s)" + " and average patch" * layers.average
    return number_table(
        f"Linear accuracy, top-1 ± standard error / top-5 in %\n{what}, {tested} images; "
        "best epochs and the rate with * were chosen by these images",
        ("features, rate per 256", "last epoch", "best epoch", "which"),
        rows,
    )
