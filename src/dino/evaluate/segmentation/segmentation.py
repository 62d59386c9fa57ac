"""Objects and classes of pixels from frozen features (section 4.2.2, Fig. 4, App. D).

Three methods: "attention", the paper's, scores masks of the CLS token's attention; "linear" and
"knn", its successors', classify patches. They need images with masks, see
`dino.evaluate.segmentation.datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from dino.evaluate.command import TRAINED, EvaluationSettings, destination, identities, table, write
from dino.evaluate.segmentation import patch_classifiers as patches
from dino.evaluate.segmentation.attention_jaccard import attention_jaccard
from dino.evaluate.segmentation.datasets import Objects, Scenes, is_voc, open_scenes
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group

Method = Literal["attention", "linear", "knn"]


@dataclass(frozen=True, kw_only=True)
class Segmentation(EvaluationSettings):
    """Find objects by attention (paper section 4.2.2, Fig. 4), or classify patches."""

    data: Path
    """A folder like PASCAL VOC's (JPEGImages, SegmentationClass), or with images and masks."""
    methods: tuple[Method, ...] = ("attention",)
    """attention: masks of the CLS token's attention, as in the paper; linear and knn: patches
    classified by a linear classifier and by nearest neighbours, mean IoU of classes."""
    mass: tuple[float, ...] = (0.6, 0.8)
    """Shares of the attention that masks hold: section 4.2.2 says 60 %, appendix D 80 %."""
    objects: Objects = "class"
    """In VOC: class, one object for each class of an image, or instance."""
    size: int = 480
    """Images are resized to squares of so many pixels; with --keep-aspect the shorter side."""
    keep_aspect: bool = False
    """Keep the ratio of the sides."""
    split: str = "val"
    """List of the images that are scored. With images and masks: if there is such a list, else all
    images, or for linear and knn those that do not train."""
    train_split: str = "train"
    """For linear and knn, list of the training images."""
    train_share: float = 0.5
    """Share that trains where images and masks have no lists."""
    seed: int = 0
    """Of this division, and of the drawn patches."""
    patches: int = 2**16
    """Most training patches."""
    penalty: float = 1e-3
    """For linear, of the squared weights."""
    steps: int = 200
    """For linear, iterations of L-BFGS at most."""
    k: int = 30
    """For knn, how many patches vote."""
    temperature: float = 0.02
    """For knn, of the votes: exp(similarity / temperature)."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("--methods must name attention, linear or knn")
        if not self.mass or not all(0 < mass < 1 for mass in self.mass):
            raise UserError(f"--mass must be shares between 0 and 1, not {self.mass}")
        if self.learns and not 0 < self.train_share < 1:
            raise UserError(f"--train-share must lie between 0 and 1, not {self.train_share}")
        if self.k < 1 or self.patches < 1 or self.steps < 1:
            raise UserError("--k, --patches and --steps must be at least 1")
        if not self.temperature > 0 or not self.penalty >= 0:
            raise UserError("--temperature must be positive, --penalty not negative")

    @property
    def learns(self) -> bool:
        """Whether a method needs training images."""
        return bool({"linear", "knn"} & {*self.methods})


def run(settings: Segmentation) -> dict[str, Any]:
    """`dino evaluate segmentation`: one table, and JSON with its provenance.

    Returns:
        The JSON's "segmentation": by network the results of each method, in percent.

    Raises:
        UserError: for weights, images or masks that do not exist or do not fit, or attention of a
            network that has none.
    """
    destination("segmentation", settings)
    training, scored = divided(settings)
    device = pick_device(settings.device)
    with process_group(device) as here:
        networks = settings.networks(device, rgb=True)
        found = {
            name: _measure(network, training, scored, settings, name)
            for name, network in networks.items()
        }
        if here.main:
            about = {
                "images": len(scored),
                "training_images": len(training),
                "networks": identities(networks),
            }
            write("segmentation", {"segmentation": found, **about}, networks[TRAINED], settings)
            Console().print(_table(found, settings, len(scored), len(training)))
    return found


def divided(settings: Segmentation) -> tuple[Scenes, Scenes]:
    """The training images, none if no method learns, and those that are scored."""
    root, lists = settings.data, (settings.train_split, settings.split)
    if is_voc(root):
        scored = open_scenes(root, settings.split, settings.objects)
        if not settings.learns:
            return Scenes([], []), scored
        return open_scenes(root, settings.train_split, settings.objects), scored
    listed = [(root / f"{name}.txt").is_file() for name in lists]
    if not settings.learns:
        return Scenes([], []), open_scenes(root, settings.split if listed[1] else None)
    if any(listed):
        return open_scenes(root, lists[0]), open_scenes(root, lists[1])
    scenes = open_scenes(root, None)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(scenes), generator=generator).tolist()
    count = round(settings.train_share * len(scenes))
    if count in (0, len(scenes)):
        raise UserError(f"{len(scenes)} images cannot be divided by --train-share: give lists")
    return scenes.some(sorted(order[:count])), scenes.some(sorted(order[count:]))


def _measure(
    backbone: Backbone, training: Scenes, scored: Scenes, settings: Segmentation, name: str
) -> dict[str, Any]:
    """The results of each method."""
    extractor = patches.PatchExtractor(
        backbone, settings.size, settings.keep_aspect, settings.precision
    )
    result: dict[str, Any] = {}
    if "attention" in settings.methods:
        result["attention"] = attention_jaccard(extractor, scored, settings.mass, name)
    if not settings.learns:
        return result
    device = next(backbone.parameters()).device
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


def _table(
    found: Mapping[str, Mapping[str, Any]], settings: Segmentation, images: int, training: int
) -> Table:
    """One row a measure, one column a network."""
    rows: dict[str, list[str]] = {}
    if "attention" in settings.methods:
        results = [one["attention"] for one in found.values()]
        for mass in results[0]["masses"]:
            for choice, label in CHOICES.items():
                scores = (one["masses"][mass][choice] for one in results)
                rows[f"{float(mass):.0%} of attention, {label}"] = [f"{x:.1f}" for x in scores]
        rows["the whole image"] = [f"{one['whole_image']:.1f}" for one in results]
    for method, label in (("linear", "linear"), ("knn", f"{settings.k} neighbours")):
        if method in settings.methods:
            scores = (one[method]["miou"] for one in found.values())
            rows[f"patches, {label}, mIoU"] = [f"{score:.1f}" for score in scores]
    learned = f", {training} for training" if training else ""
    title = f"segmentation, Jaccard index in %\n{images} images{learned}, {settings.size} px"
    return table(title, ["masks", *found], rows)
