"""Objects and classes of pixels from frozen features (section 4.2.2, Fig. 4, App. D).

Three methods: "attention", the paper's, scores masks of the CLS token's attention; "linear" and
"knn", its successors', classify patches. They need images with masks, see
`dino.evaluate.segmentation.datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from dino.evaluate import command
from dino.evaluate.segmentation.attention_jaccard import attention_jaccard
from dino.evaluate.segmentation.datasets import Objects, Scene, is_voc, list_file, open_scenes
from dino.features import patch_classifiers as patches
from dino.features.command import number_table
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.settings import Range, validated

Count = Annotated[int, Range(low=1, high=10**9)]
Method = Literal["attention", "linear", "knn"]


@dataclass(frozen=True, kw_only=True)
class Segmentation(command.EvaluationSettings):
    """Find objects by attention (paper section 4.2.2, Fig. 4), or classify patches."""

    data: Path
    """A folder like PASCAL VOC's (JPEGImages, SegmentationClass), or with images and masks."""
    methods: tuple[Method, ...] = ("attention",)
    """attention: masks of the CLS token's attention, as in the paper; linear and knn: patches
    classified by a linear classifier and by nearest neighbours, mean IoU of classes."""
    mass: Annotated[tuple[float, ...], Range(above=0, below=1)] = (0.6, 0.8)
    """Shares of the attention that masks hold: section 4.2.2 says 60 %, appendix D 80 %."""
    objects: Objects = "class"
    """In VOC: class, one object for each class of an image, or instance."""
    size: Count = 480
    """Shorter side of the network's input, to which images are resized; nothing is cropped."""
    keep_aspect: bool = False
    """Keep the ratio of the sides, up to 8; without it, squares, as in the paper."""
    split: str = "val"
    """List of the images that are scored. With images and masks: if there is such a list, else all
    images, or for linear and knn those that do not train."""
    train_split: str = "train"
    """For linear and knn, list of the training images."""
    train_share: Annotated[float, Range(above=0, below=1)] = 0.5
    """Share that trains where images and masks have no lists."""
    seed: Annotated[int, Range(low=0, below=2**63)] = 0
    """Of this division, and of the drawn patches."""
    patches: Count = 2**16
    """Most training patches."""
    penalty: Annotated[float, Range(low=0)] = 1e-3
    """For linear, of the squared weights."""
    steps: Count = 200
    """For linear, iterations of L-BFGS at most."""
    k: Count = 30
    """For knn, how many patches vote."""
    temperature: Annotated[float, Range(above=0)] = 0.02
    """For knn, of the votes: exp(similarity / temperature)."""


def run(settings: Segmentation) -> dict[str, Any]:
    """`dino evaluate segmentation`: one table, and JSON with its provenance.

    Returns:
        The JSON's "segmentation": by network the results of each method, in percent.

    Raises:
        UserError: for weights, images or masks that are missing or inconsistent, or attention of a
            network that has none.
    """
    settings = validated(settings)
    if not settings.methods or not settings.mass:
        raise UserError("--methods must name attention, linear or knn, --mass one share or more")
    with command.evaluation_run("segmentation", settings, settings.data, rgb=True) as started:
        training, scored = divided(settings)
        if training:
            images = ([str(scene.image) for scene in scenes] for scenes in (training, scored))
            started.compare_images(*images)
        found = {
            name: _measure(network, name, settings, training, scored)
            for name, network in started.networks.items()
        }
        rows = _rows(found, settings)
        learned = f", {len(training)} for training" if training else ""
        title = f"{len(scored)} images{learned}, {settings.size} px"
        cells = {
            name: [f"{score:.1f}" for score in by_network] for name, by_network in rows.items()
        }
        started.report(
            {"segmentation": found, "images": len(scored), "training_images": len(training)},
            number_table(f"segmentation, Jaccard index in %\n{title}", ["masks", *found], cells),
            images=len(scored),
            scores={
                name: {of: {"percent": score} for of, score in zip(found, by_network, strict=True)}
                for name, by_network in rows.items()
            },
        )
    return found


def divided(settings: Segmentation) -> tuple[list[Scene], list[Scene]]:
    """The training images, none if no method learns, and those that are scored."""
    root = settings.data

    def scenes(split: str | None) -> list[Scene]:
        return open_scenes(root, split, settings.objects)

    train, scored = (
        split if is_voc(root) or list_file(root, split).is_file() else None
        for split in (settings.train_split, settings.split)
    )
    if not {"linear", "knn"} & {*settings.methods}:
        return [], scenes(scored)
    if train or scored:
        return scenes(settings.train_split), scenes(settings.split)
    every = scenes(None)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(every), generator=generator).tolist()
    count = round(settings.train_share * len(every))
    if count in (0, len(every)):
        raise UserError(f"{len(every)} images cannot be divided by --train-share: give lists")
    first, second = ([every[i] for i in sorted(half)] for half in (order[:count], order[count:]))
    return first, second


def _measure(
    network: Backbone, name: str, settings: Segmentation, training: list[Scene], scored: list[Scene]
) -> dict[str, Any]:
    """The results of each method."""
    extractor = patches.PatchExtractor(
        network, settings.size, settings.keep_aspect, settings.precision
    )
    result: dict[str, Any] = {}
    if "attention" in settings.methods:
        result["attention"] = attention_jaccard(extractor, scored, settings.mass, name)
    if not training:
        return result
    device = next(network.parameters()).device
    bank = patches.training_patches(extractor, training, settings.patches, settings.seed, name)
    scorers: dict[str, patches.Scorer] = {}
    if "linear" in settings.methods:
        scorers["linear"] = patches.linear(bank, settings.penalty, settings.steps, device)
    if "knn" in settings.methods:
        scorers["knn"] = patches.neighbours(bank, settings.k, settings.temperature, device)
    counts = patches.confusions(extractor, scored, scorers, bank.classes, name)
    return result | {method: patches.mean_iou(count) for method, count in counts.items()}


CHOICES = {
    "best_per_object": "best head per object",
    "best_per_image": "best head per image",
    "mean_map": "mean of heads",
}


def _rows(found: Mapping[str, Mapping[str, Any]], settings: Segmentation) -> dict[str, list[float]]:
    """One row a measure, one column a network, in percent."""
    rows: dict[str, list[float]] = {}
    if "attention" in settings.methods:
        results = [one["attention"] for one in found.values()]
        for mass in results[0]["masses"]:
            for choice, label in CHOICES.items():
                name = f"{float(mass):.0%} of attention, {label}"
                rows[name] = [one["masses"][mass][choice] for one in results]
        rows["the entire image"] = [one["whole_image"] for one in results]
    for method, label in (("linear", "linear"), ("knn", f"{settings.k} neighbours")):
        if method in settings.methods:
            rows[f"patches, {label}, mIoU"] = [one[method]["miou"] for one in found.values()]
    return rows
