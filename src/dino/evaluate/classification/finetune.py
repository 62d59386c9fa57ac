"""Fine-tuning on labels with DeiT's recipe (paper section 4.2.3, Tables 6 and 11)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.table import Table

from dino.data.sources.open import Source
from dino.evaluate import command
from dino.evaluate.classification import linear_classifier as classifiers
from dino.evaluate.classification.deit_augmentation import (
    TASK,
    AugmentedBatches,
    Recipe,
    RecipeSettings,
)
from dino.evaluate.classification.finetune_training import Epoch, FineTunedNetwork, measure, tune
from dino.evaluate.classification.linear_classifier import Classifier
from dino.evaluate.epoch_checkpoint import EpochCheckpoint
from dino.evaluate.results import file_name
from dino.evaluate.shared_images import paths_of
from dino.features.cache import files_digest
from dino.features.command import Count, Images, Seed, Workers, number_table
from dino.features.table import count_classes, labels_in, labels_of, open_labelled
from dino.files import UserError
from dino.runtime import ranks
from dino.settings import validated
from dino.weights import load as weights
from dino.weights.load import fingerprint

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"lr": 5e-4, "epochs": 300, "batch": 1024, "lr_end": 1e-5},
    "cifar": {"lr": 5e-6, "epochs": 1000, "batch": 768, "lr_end": 1e-6},
    "inat": {"lr": 5e-5, "epochs": 300, "batch": 1024, "lr_end": 1e-6},
}
"""The authors' numbers (issues 31, 81, 144 and 171 of the published code).

ImageNet: 1e-3 for 1024 images. CIFAR: 7.5e-6 for 768 images. iNaturalist: 5e-5 per 512 images, 128
on each GPU; the number of GPUs is not published. DeiT's final rate of 1e-5 exceeds all rates of
CIFAR, so the last two presets end at the start of the warm-up. The published factor of the
classifier's initial weights is "small"; .01 is a guess.
"""

NETWORK, CLASSIFIER = ".safetensors", ".classifier.safetensors"
"""Endings of the tuned network and its classifier, beside the result."""


@dataclass(frozen=True, kw_only=True)
class FineTune(RecipeSettings, command.EvaluationSettings):
    """Train the full network on labelled images with DeiT's recipe (paper section 4.2.3)."""

    renamed: ClassVar[dict[str, str]] = {"forward": "forward-batch"}

    data: Images
    """Images to train on: a folder with one sub-folder for each class, or a list with labels."""
    val: Images
    """Images to test on, laid out like those of --data."""
    preset: Literal["imagenet", "cifar", "inat"] = "imagenet"
    """The authors' lr, epochs, batch and lr-end for a kind of data; cifar suits small sets.
    Each can be set by itself."""
    workers: Workers | None = None
    """Processes that read images; by default one for each core but one, at most 16."""
    forward_batch: Count = 64
    """Test images at a time."""
    seed: Seed = 0
    """Of the classifier, the orders and all random numbers."""

    def recipe(self) -> Recipe:
        """The preset with the options that are set.

        Raises:
            UserError: for impossible numbers.
        """
        options = {option.name: getattr(self, option.name) for option in fields(RecipeSettings)}
        chosen = {name: value for name, value in options.items() if value is not None}
        recipe = Recipe(**{**PRESETS[self.preset], **chosen})
        if recipe.warmup >= recipe.epochs:
            raise UserError(
                f"a warm-up of {recipe.warmup} epochs leaves none of {recipe.epochs}: "
                "set a smaller --warmup"
            )
        return recipe


def run(settings: FineTune) -> dict[str, Any]:
    """`dino evaluate finetune`: one table, the result as JSON, the network and its classifier.

    Beside the JSON, NAME.safetensors is the tuned network, for `dino.load`, and
    NAME.classifier.safetensors its classifier, for `dino evaluate linear --classifier`.

    Returns:
        The JSON without its provenance: "finetune" holds loss and accuracy of every epoch for each
        network.

    Raises:
        UserError: for weights or data that do not exist, or a recipe that does not fit them.
    """
    settings = validated(settings)
    recipe = settings.recipe()
    images = (settings.data, settings.val)
    with command.evaluation_run("finetune", settings, *images, rgb=True) as started:
        source, val, counts = open_labelled(*images, started.pixels, TASK)
        started.compare_images(paths_of(source), paths_of(val))
        _check(recipe, source)
        found = {
            name: _tuned(name, started, source, val, recipe, settings) for name in started.networks
        }
        content = {
            "finetune": {
                name: [{"loss": one.loss, **one.accuracy.percentages()} for one in history]
                for name, history in found.items()
            },
            "recipe": asdict(recipe),
            "images": {"train": len(source), "val": len(val), **counts},
        }
        last = {name: history[-1].accuracy for name, history in found.items()}
        started.report(
            content,
            _table(found, recipe, last[command.TRAINED].images),
            images=last[command.TRAINED].images,
            scores={"top-1, last epoch": {name: one.score() for name, one in last.items()}},
            files=[started.path.with_suffix(ending) for ending in (NETWORK, CLASSIFIER)],
        )
    return content


def _check(recipe: Recipe, source: Source) -> None:
    if len(source) < recipe.batch:
        raise UserError(
            f"{len(source)} images do not fill a batch of {recipe.batch}: set a smaller --batch"
        )
    step = ranks().world * (2 if recipe.mixup or recipe.cutmix else 1)  # images are mixed in pairs
    if recipe.batch % step:
        raise UserError(f"a batch of {recipe.batch} must be a multiple of {step}: change --batch")


def _tuned(
    name: str,
    started: command.EvaluationRun,
    source: Source,
    val: Source,
    recipe: Recipe,
    settings: FineTune,
) -> list[Epoch]:
    """Fine-tune a network, and write it if it is the trained one."""
    network, path = started.networks[name], started.path
    labels, classes = labels_of(source, TASK), count_classes(source, TASK)
    truth = labels_in(source.classes, val, TASK)
    key = [fingerprint(network), files_digest(source), files_digest(val), labels.tolist()]
    checkpoint = EpochCheckpoint(
        path.with_suffix(f".{file_name(name)}.unfinished.safetensors"),
        [*key, settings.seed, asdict(recipe)],
    )
    model = FineTunedNetwork(network, classes, recipe.head_scale, settings.seed)
    options = (settings.forward_batch, settings.workers, settings.precision)
    batches = AugmentedBatches(network, source, recipe, classes, settings.seed, settings.workers)
    with checkpoint.interruptible():
        history = tune(
            model,
            batches,
            lambda: measure(model, val, truth, *options),
            checkpoint,
            settings.precision,
        )
    if ranks().main and name == command.TRAINED:
        _save(model, source, history, settings, path)
    checkpoint.delete()
    return history


def _save(
    model: FineTunedNetwork, source: Source, history: list[Epoch], settings: FineTune, path: Path
) -> None:
    origin = {"finetuned_from": settings.weights, "preset": settings.preset}
    weights.save(model.backbone, path.with_suffix(NETWORK), origin)
    about = {"blocks": 1, "average": False, "sha256": fingerprint(model.backbone)}
    about |= {"top1": history[-1].accuracy.top1, **origin}
    head = Classifier(model.head.weight, model.head.bias, source.classes, about)
    classifiers.save(head, path.with_suffix(CLASSIFIER))


def _table(found: dict[str, list[Epoch]], recipe: Recipe, images: int) -> Table:
    rows = {}
    for name, history in found.items():
        last = history[-1]
        best = max(history, key=lambda epoch: epoch.accuracy.top1)
        cells = [str(last.accuracy), str(best.accuracy)]
        rows[name] = [*cells, str(history.index(best) + 1), f"{last.loss:.3f}"]
    epochs = f"{recipe.epochs} epoch" + "s" * (recipe.epochs > 1)
    return number_table(
        f"Fine-tuned for {epochs}, top-1 ± standard error / top-5 in %\n{images} images",
        ("from", "last epoch", "best epoch", "which", "last loss"),
        rows,
    )
