"""The pictures and batches of DeiT's training: repeated and augmented, erased, mixed.

timm's parts draw from the global generators of Python, NumPy and PyTorch; here these are seeded by
(seed, epoch, image) or (seed, epoch, step) around each call and put back afterwards, so that a
training goes on after an interruption with the very same batches.

Shapes: B images of a rank's share of a step, C classes, S pixels a side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
from dino.data.views.view_spec import ViewSpec, draw_views, epoch_order, generator
from dino.evaluate.classification.feature_batches import TASK, crop_spec
from dino.evaluate.features.table import Part, labels_of, place_among_ranks, share_of, tell_skipped
from dino.files import UserError
from dino.models.backbone import Backbone

NEED = "fine-tuning needs timm: pip install 'dino-ssl[timm]'"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of a fine-tuning; DeiT's where the authors name none.

    Attributes:
        lr: learning rate per 512 images.
        epochs: passes over the images.
        batch: images of a step over all ranks.
        weight_decay: of AdamW; not of biases, norms, the CLS token and the position embedding.
        warmup: epochs from `lr_start` to the full rate.
        lr_start: of the first epoch, not scaled by the batch.
        lr_end: at the end of the cosine, not scaled by the batch.
        drop_path: rate of the last block; it grows linearly from 0.
        smoothing: of the labels.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix, which is taken half of the time; 0 for none.
        erase: probability of random erasing.
        policy: of RandAugment, in timm's words.
        repeats: how often an epoch shows each of its images; it shows 1 / repeats of all.
        head_scale: factor of the new classifier's initial weights (normal, std .02).
        layer_decay: factor of the learning rate from each block to the one before; 1 for none.
    """

    lr: float
    epochs: int
    batch: int
    weight_decay: float = 0.05
    warmup: int = 5
    lr_start: float = 1e-6
    lr_end: float = 1e-5
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    policy: str = "rand-m9-mstd0.5-inc1"
    repeats: int = 3
    head_scale: float = 0.01
    layer_decay: float = 1.0


def random_crop(
    image: Image.Image, spec: ViewSpec, random: np.random.Generator, filter: Image.Resampling
) -> Image.Image:
    """A crop of `spec.size` pixels a side, and its flip, as drawn from `random`."""
    (view,) = draw_views([spec], image.height, image.width, random)
    top, left, height, width = view.box
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((spec.size, spec.size), filter)
    return ImageOps.mirror(crop) if view.flip else crop


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep so many bits of each channel; with none the picture is black.

    timm's operation asks for none at the highest magnitudes, which Pillow used to take and now
    refuses.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[np.random.Generator]:
    """Python's, NumPy's and PyTorch's generators keyed for the body; what they were, after it."""
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


class Pictures(Source):
    """The augmented pictures of one epoch, in its order: a `Source`.

    A random crop (bicubic) and flip, then RandAugment, keyed by (seed, epoch, repeat, image).
    """

    def __init__(
        self, source: Source, backbone: Backbone, recipe: Recipe, seed: int, epoch: int
    ) -> None:
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError:
            raise UserError(NEED) from None
        how, self.recipe = backbone.preprocessing, recipe
        grey = tuple(round(255 * mean) for mean in how.mean)
        hints = {"translate_const": int(0.45 * how.crop), "img_mean": grey}
        self.policy = rand_augment_transform(recipe.policy, hints)
        for operation in self.policy.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        self.source, self.seed, self.epoch = source, seed, epoch
        self.spec = crop_spec(how.crop)
        order = epoch_order(len(source), seed, epoch)
        self.order = np.repeat(order, recipe.repeats)[: len(source)].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Image.Image:
        image, repeats = as_picture(self.source[self.order[place]]), self.recipe.repeats
        with seeded(self.seed, self.epoch * repeats + place % repeats, self.order[place]) as rng:
            crop = random_crop(image, self.spec, rng, Image.Resampling.BICUBIC)
            return self.policy(crop)

    def path(self, place: int) -> str:
        """Where the image at this place of the order lies, for messages."""
        return self.source.path(self.order[place])


@dataclass(frozen=True)
class Augmented:
    """The batches of a rank.

    Attributes:
        backbone: whose preprocessing gives the size and the normalisation.
        source: labelled images.
        recipe: how they are altered.
        classes: C.
        seed: of everything random.
        workers: processes that read images.
    """

    backbone: Backbone
    source: Source
    recipe: Recipe
    classes: int
    seed: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.source) // self.recipe.batch

    def epoch(self, epoch: int) -> Iterator[tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B C"]]]:
        """This rank's images and soft labels of each step; the last images that fill none go.

        An image that cannot be used is replaced by another of its batch.

        Raises:
            UserError: if no image of a batch can be used.
        """
        device, labels = next(self.backbone.parameters()).device, labels_of(self.source, TASK)
        pictures = Pictures(self.source, self.backbone, self.recipe, self.seed, epoch)
        batch, here = self.recipe.batch, place_among_ranks()
        steps = [range(step * batch, (step + 1) * batch) for step in range(len(self))]
        mine = [place for step in steps for place in share_of(step, *here)]
        share, skipped = len(mine) // len(self), list[ImageError]()
        parts = evaluation_loader(Part(pictures, mine), to_tensor, share, self.workers)
        for step, part in enumerate(parts):
            skipped += part.skipped
            if len(part.index) == 0:
                raise UserError(f"no image of a batch can be used, the first: {part.skipped[0]}")
            filled = torch.arange(share) % len(part.index)
            places = [mine[int(place)] for place in part.index[filled]]
            truth = labels[[pictures.order[place] for place in places]]
            # Beyond the numbers of the images, which key their crops.
            key = len(self.source) + step * batch + mine[step * share] % batch
            with seeded(self.seed, epoch, key):
                yield self._mix(part.images[filled].to(device), truth.to(device))
        tell_skipped(skipped, len(self.source))

    def _mix(self, images: Tensor, labels: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Normalise, erase and mix a batch."""
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing

        erasing: Any = RandomErasing  # these have no types
        mixing: Any = Mixup
        how, recipe = self.backbone.preprocessing, self.recipe
        pixels = normalize(images, how.mean, how.std)
        pixels = erasing(recipe.erase, mode="pixel", device=pixels.device)(pixels)
        if not recipe.mixup and not recipe.cutmix:
            soft = F.one_hot(labels, self.classes) * (1 - recipe.smoothing)
            return pixels, soft + recipe.smoothing / self.classes
        options: dict[str, Any] = {
            "mixup_alpha": recipe.mixup,
            "cutmix_alpha": recipe.cutmix,
            "label_smoothing": recipe.smoothing,
            "num_classes": self.classes,
        }
        mixed: tuple[Tensor, Tensor] = mixing(**options)(pixels, labels)
        return mixed
