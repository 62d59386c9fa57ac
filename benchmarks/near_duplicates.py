"""How many copies, and how many unrelated pairs, near duplicates at a threshold consist of.

    python benchmarks/near_duplicates.py --weights RUN --data photos/

Of every tenth photograph eight copies are made. Printed are, for cosines of the descriptor as it is
and after the whitening of `dino evaluate copies --data`, the share of copies whose similarity to
their original reaches the threshold, by the way they were made, and the number of pairs of
different photographs that reach it too. The photographs must not have duplicates of their own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from rich.console import Console
from torch import Tensor

from dino.data.images.decode import as_picture
from dino.data.sources.open import Source, open_source
from dino.data.sources.torch_dataset import TorchDataset
from dino.features.command import number_table
from dino.features.copy_descriptor import RIDGE, descriptor
from dino.features.extractor import extract
from dino.features.whitening import Whitening
from dino.weights.load import load

EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure thresholds of near duplicates."""

    weights: str
    """Run folder, file of weights or published name."""
    data: str
    """Photographs without duplicates."""
    thresholds: tuple[float, ...] = (0.995, 0.99, 0.95, 0.9, 0.85, 0.8)
    """Cosine similarities."""


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def inner(image: Image.Image, share: float) -> Image.Image:
    """The middle of an image, a share of its area."""
    width, height = (round(side * share**0.5) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def overlaid(image: Image.Image) -> Image.Image:
    image = image.copy()
    font = ImageFont.load_default(image.width // 10)
    place = (image.width // 10, image.height // 3)
    ImageDraw.Draw(image).text(place, "A COPY", (255, 255, 0), font)
    return image


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "JPEG 30": lambda image: jpeg(image, 30),
    "JPEG 10": lambda image: jpeg(image, 10),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "90 %": lambda image: inner(image, 0.9),
    "50 %": lambda image: inner(image, 0.5),
    "text": overlaid,
    "mirrored": ImageOps.mirror,
}


def main(settings: Settings) -> None:
    backbone = load(settings.weights)
    photographs = open_source(settings.data)

    def features(source: Source) -> Tensor:
        return extract(backbone, source, descriptor(backbone)).finite()

    originals = features(photographs)
    chosen = range(0, len(photographs), EVERY)
    copies = {
        kind: features(TorchDataset([alter(as_picture(photographs[i])) for i in chosen]))
        for kind, alter in COPIES.items()
    }
    white = Whitening.learn(torch.cat([originals, *copies.values()]), "centred", RIDGE)
    for name, change in (("as it is", lambda rows: rows), ("whitened", white)):
        rows = F.normalize(change(originals), dim=1)
        pairs = (rows @ rows.T).triu(1)
        near = {k: (F.normalize(change(c), dim=1) * rows[chosen]).sum(1) for k, c in copies.items()}
        cells = {
            f"{threshold:g}": [
                *(f"{100 * (values >= threshold).double().mean():.0f}" for values in near.values()),
                f"{int((pairs >= threshold).sum()):,}",
            ]
            for threshold in settings.thresholds
        }
        title = (
            f"copies found in %, descriptor {name}\n{len(rows)} photographs, {len(chosen)} copied"
        )
        Console().print(number_table(title, ["cosine", *near, "wrong pairs"], cells))


if __name__ == "__main__":
    main(tyro.cli(Settings))
