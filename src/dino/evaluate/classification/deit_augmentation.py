"""Training batches of DeiT: repeated augmentation, random erasing, mixup and cutmix.

timm's functions draw from the global generators of Python, NumPy and PyTorch. These are seeded by
(seed, epoch, image) or (seed, epoch, step) around each call and restored afterwards, so that a
training continues after an interruption with the same batches.

Shapes: B images of a rank's share of a step, C classes, S pixels a side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.images.decode import as_picture, to_tensor
from dino.data.images.image_errors import ImageError
from dino.data.loader import evaluation_loader
from dino.data.sources.open import Source
from dino.data.views.photometric import normalize
from dino.data.views.random_streams import draw_views, epoch_order, generator
from dino.evaluate.classification.feature_batches import crop_spec
from dino.features.command import Count, Positive, Share
from dino.features.table import Subset, labels_of, my_shares, warn_skipped
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.settings import Range

TASK = "fine-tuning"

NotNegative = Annotated[float, Range(low=0)]


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The options of a fine-tuning; DeiT's numbers, and None where the preset decides."""

    lr: Positive | None = None
    """Learning rate per 512 images."""
    epochs: Count | None = None
    """Passes over the images."""
    batch: Count | None = None
    """Images of a step, over all ranks."""
    lr_start: NotNegative = 1e-6
    """Learning rate of the first epoch, not scaled by the batch."""
    lr_end: NotNegative | None = None
    """Learning rate at the end of the cosine, not scaled by the batch."""
    warmup: Annotated[int, Range(low=0)] = 5
    """Epochs of warm-up."""
    weight_decay: NotNegative = 0.05
    """Of AdamW; not of biases, norms, the CLS token and the position embedding."""
    drop_path: Annotated[float, Range(low=0, below=1)] = 0.1
    """Drop path rate of the last block; it grows linearly from 0."""
    mixup: NotNegative = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: NotNegative = 1.0
    """Alpha of cutmix, which replaces mixup half of the time; 0 for none."""
    erase: Share = 0.25
    """Probability of random erasing."""
    policy: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, as timm writes it."""
    smoothing: Annotated[float, Range(low=0, below=1)] = 0.1
    """Label smoothing."""
    repeats: Count = 3
    """How often an epoch repeats each of its images; it has 1 / repeats of all images."""
    head_scale: Positive = 0.01
    """Factor of the new classifier's initial weights (normal, std .02)."""
    layer_decay: Positive = 1.0
    """Factor of the learning rate from each block to the one before; 1 for none."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeSettings):
    """A recipe in which every number is set."""

    lr: float
    epochs: int
    batch: int
    lr_end: float


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep `bits` bits of each channel; 0, which timm requests and Pillow refuses, gives black."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[np.random.Generator]:
    """Seed Python's, NumPy's and PyTorch's generators for the body, and restore them after it."""
    rng = generator(seed, epoch, index)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        number = int(rng.integers(2**32))
        random.seed(number), np.random.seed(number), torch.manual_seed(number)
        try:
            yield rng
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class AugmentedImages(Subset):
    """The augmented images of one epoch, in its order: a `Source`.

    A random crop (bicubic) and flip, then RandAugment, keyed by (seed, epoch, repeat, image).
    """

    def __init__(
        self, source: Source, backbone: Backbone, recipe: Recipe, seed: int, epoch: int
    ) -> None:
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError:
            raise UserError("fine-tuning needs timm: pip install 'dino-ssl[timm]'") from None
        transform, self.recipe = backbone.preprocessing, recipe
        grey = tuple(round(255 * mean) for mean in transform.mean)
        hints = {"translate_const": int(0.45 * transform.crop), "img_mean": grey}
        self.policy = rand_augment_transform(recipe.policy, hints)
        for operation in self.policy.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        self.seed, self.epoch, self.spec = seed, epoch, crop_spec(transform.crop)
        order = epoch_order(len(source), seed, epoch)
        super().__init__(source, np.repeat(order, recipe.repeats)[: len(source)].tolist())

    def __getitem__(self, index: int) -> Image.Image:
        image, repeats = as_picture(super().__getitem__(index)), self.recipe.repeats
        with seeded(self.seed, self.epoch * repeats + index % repeats, self.indices[index]) as rng:
            (view,) = draw_views([self.spec], image.height, image.width, rng)
            top, left, height, width = view.box
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((self.spec.size, self.spec.size), Image.Resampling.BICUBIC)
            return self.policy(ImageOps.mirror(crop) if view.flip else crop)


@dataclass(frozen=True)
class AugmentedBatches:
    """The training batches of a rank; `backbone` gives the size and the normalisation."""

    backbone: Backbone
    source: Source
    recipe: Recipe
    classes: int
    seed: int
    workers: int | None = 0

    def __len__(self) -> int:
        return len(self.source) // self.recipe.batch

    def epoch(self, epoch: int) -> Iterator[tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B C"]]]:
        """This rank's images and soft labels of each step; an incomplete last step is left out.

        An image that cannot be used is replaced by another of its batch.

        Raises:
            UserError: if no image of a batch can be used.
        """
        device, labels = next(self.backbone.parameters()).device, labels_of(self.source, TASK)
        images = AugmentedImages(self.source, self.backbone, self.recipe, self.seed, epoch)
        starts = range(0, len(self) * self.recipe.batch, self.recipe.batch)
        shares = my_shares([range(start, start + self.recipe.batch) for start in starts])
        places, size = list(chain.from_iterable(shares)), len(shares[0])
        skipped: list[ImageError] = []
        loaded = evaluation_loader(Subset(images, places), to_tensor, size, self.workers)
        for share, batch in zip(shares, loaded, strict=True):
            skipped += batch.skipped
            if len(batch.index) == 0:
                raise UserError(f"no image of a batch can be used, the first: {batch.skipped[0]}")
            filled = torch.arange(size) % len(batch.index)
            truth = labels[[images.indices[places[i]] for i in batch.index[filled].tolist()]]
            # Larger than the indices of the images, which key their crops.
            with seeded(self.seed, epoch, len(self.source) + share[0]):
                yield self._mix(batch.images[filled].to(device), truth.to(device))
        warn_skipped(skipped, len(self.source))

    def _mix(self, images: Tensor, labels: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Normalise, erase and mix a batch."""
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing

        erasing: Any = RandomErasing  # timm has no types
        mixing: Any = Mixup
        transform, recipe = self.backbone.preprocessing, self.recipe
        pixels = normalize(images, transform.mean, transform.std)
        pixels = erasing(recipe.erase, mode="pixel", device=pixels.device)(pixels)
        if not recipe.mixup and not recipe.cutmix:
            soft = F.one_hot(labels, self.classes) * (1 - recipe.smoothing)
            return pixels, soft + recipe.smoothing / self.classes
        mixup = mixing(
            recipe.mixup,
            recipe.cutmix,
            label_smoothing=recipe.smoothing,
            num_classes=self.classes,
        )
        mixed: tuple[Tensor, Tensor] = mixup(pixels, labels)
        return mixed
