"""Fine-tuning on labels with DeiT's recipe (paper section 4.2.3, Tables 6 and 11)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from dino.data.sources.open import Source, open_source
from dino.evaluate import command as results
from dino.evaluate.classification import linear_classifier as classifiers
from dino.evaluate.classification.deit_augmentation import Augmented, Recipe
from dino.evaluate.classification.feature_batches import TASK
from dino.evaluate.classification.finetune_training import Epoch, Tuned, measure, tune
from dino.evaluate.classification.linear_classifier import Classifier
from dino.evaluate.command import Measured
from dino.evaluate.epoch_checkpoint import Unfinished
from dino.evaluate.features.cache import files_digest
from dino.evaluate.features.table import labels_of, matched_labels
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group, ranks
from dino.weights import load as weights
from dino.weights.load import fingerprint

PRESETS = {
    "imagenet": Recipe(lr=5e-4, epochs=300, batch=1024),
    "cifar": Recipe(lr=5e-6, epochs=1000, batch=768, lr_end=1e-6),
    "inat": Recipe(lr=5e-5, epochs=300, batch=1024, lr_end=1e-6),
}
"""What the authors told (issues 31, 81, 144 and 171 of the published code), DeiT's for the rest.

ImageNet: 1e-3 for 1024 images. CIFAR: 7.5e-6 for 768 images. iNaturalist: 5e-5 per 512 images, 128
on each GPU; how many GPUs is not said. DeiT's final rate of 1e-5 lies above the whole of CIFAR's,
so these two end at the warm-up's start. The factor of the classifier's initial weights is "small";
.01 is a guess.
"""


@dataclass(frozen=True, kw_only=True)
class FineTune(Measured):
    """Train the whole network on labelled images with DeiT's recipe (paper section 4.2.3)."""

    data: str
    """Images to train on: a folder with one sub-folder for each class, or a list with labels."""
    val: str
    """Images to test on, laid out like the others."""
    preset: Literal["imagenet", "cifar", "inat"] = "imagenet"
    """The authors' numbers for a kind of data; cifar suits small sets. Whatever is set below
    replaces them."""
    lr: float | None = None
    """Learning rate per 512 images."""
    epochs: int | None = None
    """Passes over the images."""
    batch: int | None = None
    """Images of a step, over all ranks."""
    warmup: int | None = None
    """Epochs of warm-up."""
    weight_decay: float | None = None
    """Of AdamW."""
    drop_path: float | None = None
    """Rate of drop path in the last block."""
    mixup: float | None = None
    """Alpha of mixup; 0 for none."""
    cutmix: float | None = None
    """Alpha of cutmix; 0 for none."""
    erase: float | None = None
    """Probability of random erasing."""
    smoothing: float | None = None
    """Of the labels."""
    repeats: int | None = None
    """How often an epoch shows each image that it shows; 1 shows all of them once."""
    head_scale: float | None = None
    """Factor of the classifier's initial weights."""
    layer_decay: float | None = None
    """Factor of the learning rate from each block to the one before; 1 for none."""
    forward: int = 64
    """Test images at a time."""
    seed: int = 0
    """Of the classifier, the orders and everything drawn."""

    def recipe(self) -> Recipe:
        """The preset with what is set here.

        Raises:
            UserError: for numbers that make no training.
        """
        own = {name: getattr(self, name, None) for name in (one.name for one in fields(Recipe))}
        chosen = {name: value for name, value in own.items() if value is not None}
        found = replace(PRESETS[self.preset], **chosen)
        for name in ("lr", "epochs", "batch", "repeats", "head_scale", "layer_decay"):
            if not getattr(found, name) > 0:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be positive, not {getattr(found, name)}")
        if found.warmup >= found.epochs:
            raise UserError(
                f"a warm-up of {found.warmup} epochs leaves nothing of {found.epochs}: "
                "set a smaller --warmup"
            )
        return found


def run(settings: FineTune) -> dict[str, Any]:
    """`dino evaluate finetune`: one table, the result as JSON, the network and its classifier.

    Beside the JSON, NAME.safetensors is the tuned network, for `dino.load`, and
    NAME.classifier.safetensors its classifier, for `dino evaluate linear --classifier`.

    Returns:
        What was written: "finetune" holds loss and accuracy of every epoch, for "trained" and with
        `baseline` for "untrained".

    Raises:
        UserError: for weights or data that are not there, or a recipe that fits neither.
    """
    recipe, device = settings.recipe(), pick_device(settings.device)
    with process_group(device) as here:
        backbone = weights.load(settings.weights, device)
        source, val = open_source(settings.data), open_source(settings.val)
        _check(recipe, source, here.world)
        path = settings.out or results.beside(settings.weights, "finetune")
        found = {
            name: _of_network(network, source, val, recipe, settings, path, name)
            for name, network in results.networks(backbone, settings).items()
        }
        content = {
            "finetune": {
                name: [{"loss": one.loss, **one.score._asdict()} for one in rows]
                for name, rows in found.items()
            },
            "recipe": asdict(recipe),
            "images": {"train": len(source), "val": len(val)},
        }
        if here.main:
            start = weights.load(settings.weights, device)  # `backbone` is the tuned one by now
            results.write("finetune", content, start, settings)
            Console().print(_table(found, recipe, len(val)))
    return content


def _check(recipe: Recipe, source: Source, world: int) -> None:
    labels_of(source, TASK)
    if len(source) < recipe.batch:
        raise UserError(
            f"{len(source)} images do not fill a batch of {recipe.batch}: set a smaller --batch"
        )
    step = world * (2 if recipe.mixup or recipe.cutmix else 1)  # images are mixed in pairs
    if recipe.batch % step:
        raise UserError(f"a batch of {recipe.batch} must be a multiple of {step}: change --batch")


def _of_network(
    network: Backbone,
    source: Source,
    val: Source,
    recipe: Recipe,
    settings: FineTune,
    path: Path,
    name: str,
) -> list[Epoch]:
    labels = labels_of(source, TASK)
    classes = len(source.classes) if source.classes else int(labels.max()) + 1
    truth = matched_labels(val, source.classes, TASK)
    about = [fingerprint(network), files_digest(source), labels.tolist(), settings.seed]
    saved = Unfinished(
        path.with_suffix(f".{name}.unfinished.safetensors"), [*about, asdict(recipe)]
    )
    model = Tuned(network, classes, recipe.head_scale, settings.seed)
    how = (settings.forward, settings.workers, settings.precision)
    batches = Augmented(network, source, recipe, classes, settings.seed, settings.workers)
    history = tune(
        model, batches, lambda: measure(model, val, truth, *how), saved, settings.precision
    )
    if ranks().main and name == results.TRAINED:
        _save(model, source, history, settings, path)
    saved.forget()
    return history


def _save(
    model: Tuned, source: Source, history: list[Epoch], settings: FineTune, path: Path
) -> None:
    about = {"finetuned_from": settings.weights, "preset": settings.preset}
    weights.save(model.backbone, path.with_suffix(".safetensors"), about)
    words = {"blocks": 1, "average": False, "sha256": fingerprint(model.backbone)}
    words |= {"top1": history[-1].score.top1, **about}
    head = Classifier(model.head.weight, model.head.bias, source.classes, words)
    classifiers.save(head, path.with_suffix(".classifier.safetensors"))


def _table(found: dict[str, list[Epoch]], recipe: Recipe, images: int) -> Table:
    rows = {}
    for name, history in found.items():
        last = history[-1]
        best = max(range(len(history)), key=lambda epoch: history[epoch].score.top1)
        cells = [f"{one.top1:.1f} / {one.top5:.1f}" for one in (last.score, history[best].score)]
        rows[name] = [*cells, str(best + 1), f"{last.loss:.3f}"]
    epochs = f"{recipe.epochs} epoch" + "s" * (recipe.epochs > 1)
    return results.table(
        f"Fine-tuned for {epochs}, top-1 / top-5 in % on {images} images",
        ("from", "last epoch", "best epoch", "which", "last loss"),
        rows,
    )
