"""Training linear classifiers on frozen features: which features, and the loop.

Shapes: B batch, C channels, S pixels a side, N numbers a feature, n images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.evaluate.classification.feature_batches import Batches, FromTables
from dino.evaluate.classification.linear_classifier import Classifier, Sweep, cosine, hits
from dino.evaluate.epoch_checkpoint import Unfinished
from dino.evaluate.features.cache import Descriptor
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import ranks


# ---------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class Layers:
    """Which outputs of the network the classifier sees.

    Attributes:
        blocks: the final-norm CLS tokens of so many last blocks, earliest first.
        average: then the mean of the last block's patch tokens.
    """

    blocks: int
    average: bool

    def __call__(
        self, backbone: Backbone, images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N"]:
        """One after the other, N = (blocks + average) * D."""
        found = backbone.features(images, last=self.blocks)
        parts = list(found.cls)
        if self.average:
            parts.append(found.patches[-1].mean(dim=(2, 3)))
        return torch.cat(parts, dim=1)

    def descriptor(self, transform: Callable[[Image.Image], Tensor]) -> Descriptor:
        """These features through `transform`."""
        name = f"cls{self.blocks}" + "+avg" * self.average
        return Descriptor(name, transform, self, dataclasses.asdict(self))


def layers_of(backbone: Backbone, blocks: int | None = None, average: bool | None = None) -> Layers:
    """The paper's choice for an architecture, unless told otherwise (appendix F.2).

    ViT-S and smaller: the last 4 blocks. ViT-B: the last one and the average of its patch tokens.
    Convnets: what they pool.
    """
    wide = backbone.depth > 0 and backbone.embed_dim >= 768
    if average is None:
        average = wide and blocks in (None, 1)
    if blocks is None:
        blocks = 1 if average else max(1, min(4, backbone.depth))
    return Layers(blocks, average)


@dataclass(frozen=True)
class Mirrored:
    """A transform of the mirrored picture."""

    transform: Preprocessing

    def __call__(self, image: Image.Image) -> Float[Tensor, "C S S"]:
        """Mirror, then transform."""
        return self.transform(ImageOps.mirror(image))


# ---------------------------------------------------------------------------------- training
class Score(NamedTuple):
    """Shares of rightly classified images, in percent."""

    top1: float
    top5: float


@torch.inference_mode()
def scores(
    classifier: Sweep | Classifier,
    features: Float[Tensor, "n N"],
    labels: Int[Tensor, " n"],
    device: torch.device | str = "cpu",
    chunk: int = 1024,
) -> list[Score]:
    """The accuracy of every classifier of a sweep, or of the one."""
    total = sum(
        hits(classifier.logits(part.to(device)), truth.to(device))
        for part, truth in zip(features.split(chunk), labels.split(chunk), strict=True)
    )
    assert isinstance(total, Tensor)
    return [Score(*row) for row in (100 * total.cpu().double() / len(labels)).tolist()]


@torch.inference_mode()
def train(
    sweep: Sweep,
    batches: Batches,
    evaluate: Callable[[], list[Score]],
    epochs: int,
    batch: int,
    saved: Unfinished | None = None,
    progress: bool = True,
) -> list[list[Score]]:
    """Train all classifiers of a sweep in one pass; their scores after each epoch.

    The learning rates are those of the sweep times batch / 256, and follow a cosine from epoch to
    epoch (not from step to step), as in the published code.
    """
    state, before = ({}, []) if saved is None else saved.read()
    if before:
        sweep.load_state(state)
    history = [[Score(*row) for row in rows] for rows in before]
    shown = progress and ranks().main and isinstance(batches, FromTables)
    with bar("linear", epochs * len(batches), shown=shown) as advance:
        advance(len(history) * len(batches))
        for epoch in range(len(history), epochs):
            factor = cosine(epoch, epochs) * batch / 256
            for features, labels in batches.epoch(epoch):
                sweep.step(features, labels, factor)
                advance(1)
            history.append(evaluate())
            if saved is not None:
                saved.keep(sweep.state(), history)
    return history
