"""Training linear classifiers on frozen features: the choice of features, and the loop.

Shapes: B batch, C channels, S pixels a side, N numbers a feature, n images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.evaluate.classification.feature_batches import Batches, TableBatches
from dino.evaluate.classification.knn_classifier import Accuracy
from dino.evaluate.classification.linear_classifier import Classifier, Sweep, cosine, hits
from dino.evaluate.epoch_checkpoint import EpochCheckpoint
from dino.features.extractor import Descriptor
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import ranks


# ---------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class Layers:
    """The outputs of the network that form a feature.

    Attributes:
        blocks: how many last blocks give their final-norm CLS token, earliest first.
        average: append the mean of the last block's patch tokens.
    """

    blocks: int
    average: bool

    def __call__(
        self, backbone: Backbone, images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N"]:
        """The concatenated feature, N = (blocks + average) * D."""
        features = backbone.features(images, last=self.blocks)
        parts = list(features.cls)
        if self.average:
            parts.append(features.patches[-1].mean(dim=(2, 3)))
        return torch.cat(parts, dim=1)

    def descriptor(self, backbone: Backbone) -> Descriptor:
        """These features through the transform of the weights."""
        name = f"cls{self.blocks}" + "+avg" * self.average
        return Descriptor(name, backbone.preprocessing, self, dataclasses.asdict(self))


def layers_of(backbone: Backbone, blocks: int | None = None, average: bool | None = None) -> Layers:
    """The features of an architecture; by default the paper's choice (appendix F.2).

    ViT-S and smaller: the last 4 blocks. ViT-B: the last one and the average of its patch tokens.
    Convnets: the pooled feature.
    """
    wide = backbone.depth > 0 and backbone.embed_dim >= 768
    if average is None:
        average = wide and blocks in (None, 1)
    if blocks is None:
        blocks = 1 if average else max(1, min(4, backbone.depth))
    return Layers(blocks, average)


# ---------------------------------------------------------------------------------- training
@torch.inference_mode()
def scores(
    classifier: Sweep | Classifier,
    features: Float[Tensor, "n N"],
    labels: Int[Tensor, " n"],
    device: torch.device | str = "cpu",
    chunk: int = 1024,
) -> list[Accuracy]:
    """The accuracy of every classifier of a sweep, or of a single one."""
    counts = [
        hits(classifier.logits(rows.to(device)), truth.to(device))
        for rows, truth in zip(features.split(chunk), labels.split(chunk), strict=True)
    ]
    percent = 100 * torch.stack(counts).sum(dim=0).cpu().double() / len(labels)
    return [Accuracy(top1, top5, len(labels)) for top1, top5 in percent.tolist()]


@torch.inference_mode()
def train(
    sweep: Sweep,
    batches: Batches,
    evaluate: Callable[[], list[Accuracy]],
    epochs: int,
    batch: int,
    checkpoint: EpochCheckpoint | None = None,
) -> list[list[Accuracy]]:
    """Train all classifiers of a sweep together; their scores after each epoch.

    The learning rates are those of the sweep times batch / 256, and decay along a cosine from epoch
    to epoch (not from step to step), as in the published code.
    """
    state, before = ({}, []) if checkpoint is None else checkpoint.read()
    if before:
        sweep.load_state(state)
    history = [[Accuracy(*row) for row in rows] for rows in before]
    shown = ranks().main and isinstance(batches, TableBatches)
    with bar("linear", epochs * len(batches), shown=shown) as advance:
        advance(len(history) * len(batches))
        for epoch in range(len(history), epochs):
            factor = cosine(epoch, epochs) * batch / 256
            for features, labels in batches.epoch(epoch):
                sweep.step(features, labels, factor)
                advance(1)
            history.append(evaluate())
            if checkpoint is not None:
                checkpoint.write(sweep.state(), history)
    return history
