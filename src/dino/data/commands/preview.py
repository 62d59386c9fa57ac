"""`dino data preview`: the views that training makes of some images, and all their numbers.

The views are made by `dino.data.loader` and `dino.data.views.photometric.augment`, as in training,
and shown pixel by pixel; small ones are enlarged without smoothing.

Shapes: V views, B images, C channels, S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dino.data.images.contact_sheet import PAPER, TEXT, Cell, contact_sheet
from dino.data.images.decode import as_picture, as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.loader import ViewDataset, ViewGroup
from dino.data.sampler import spread
from dino.data.sources.open import Source
from dino.data.views.photometric import augment
from dino.data.views.random_streams import ViewParams, draw_views, generator
from dino.data.views.view_spec import JITTER_OPERATIONS, NEVER_SOLARIZE, ViewSpec, expand

TILE, FRAME = 224, 3
"""Least side of a picture's place, and width of the frame around a view, in pixels."""

ENLARGED = 128
"""Views smaller than half of this are enlarged up to it, in pixels."""


@dataclass(frozen=True)
class View:
    """One view as the student gets it.

    Attributes:
        spec: its kind.
        params: every number that made it.
        picture: after the photometric stage, de-normalised.
    """

    spec: ViewSpec
    params: ViewParams
    picture: Image.Image

    def caption(self) -> list[str]:
        """What was done, in the order in which it was done."""
        top, left, height, width = self.params.box
        lines = [f"{width} x {height} at {left}, {top}"]
        lines += ["mirrored"] * self.params.flip
        if self.params.jitter:
            names = [JITTER_OPERATIONS[place] for place in self.params.order]
            lines += [
                f"{name} {getattr(self.params, name):{'+.3f' if name == 'hue' else '.2f'}}"
                for name in names
                if getattr(self.spec, name) > 0
            ]
        lines += ["grey"] * self.params.grey
        lines += [f"blur, sigma {self.params.sigma:.2f}"] * (self.params.sigma > 0)
        if self.params.solarize < NEVER_SOLARIZE:
            lines.append(f"solarized from {self.params.solarize:g}")
        return lines


@dataclass(frozen=True)
class Row:
    """An image and its views.

    Attributes:
        name: of the image.
        original: the full image.
        views: in the order in which they are made.
    """

    name: str
    original: Image.Image
    views: list[View]


def make_rows(
    source: Source,
    specs: Sequence[ViewSpec],
    *,
    images: int = 4,
    epoch: int = 0,
    seed: int = 0,
) -> tuple[list[Row], list[ImageError]]:
    """The views of some images, evenly spread, as a run with this seed makes them in this epoch.

    Returns:
        The rows, and the images in whose place others are shown, as in training.

    Raises:
        UserError: if no image can be used.
    """
    chosen = spread(len(source), images)
    dataset = ViewDataset(source, specs, seed, source.pixels.channels)
    batch = dataset.batch([(epoch, index) for index in chosen])
    pictures = [view for group in batch.groups for view in _altered(group)]
    rows = []
    for place, (index, taken) in enumerate(zip(chosen, batch.index.tolist(), strict=True)):
        full = as_pixels(source[taken])
        height, width = full.shape[1:]
        drawn = draw_views(dataset.specs, height, width, generator(seed, epoch, index))
        views = [
            View(spec, params, as_picture(picture[place]))
            for spec, params, picture in zip(expand(dataset.specs), drawn, pictures, strict=True)
        ]
        rows.append(Row(source.path(taken), as_picture(full), views))
    return rows, batch.skipped


def _altered(group: ViewGroup) -> UInt8[Tensor, "V B C S S"]:
    """The views of a group after the photometric stage, as levels."""
    channels = group.images.shape[2]
    mean, std = [0.0] * channels, [1 / 255] * channels  # leave 0 to 255 as they are
    levels = augment(group.images.flatten(0, 1), group.params.flatten(0, 1), mean, std)
    return levels.round().clamp(0, 255).to(torch.uint8).view(group.images.shape)


# ---------------------------------------------------------------------------------- drawing
def preview_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """Each image (one or more), its crops drawn in, and its views with their numbers."""
    scaled = [[enlarged(view.picture) for view in row.views] for row in rows]
    tile = max(TILE, *(picture.width for pictures in scaled for picture in pictures)) + 2 * FRAME
    cells = []
    for row, pictures in zip(rows, scaled, strict=True):
        size = f"{row.original.width} x {row.original.height}"
        cells.append([Cell(with_boxes(row, tile), f"{row.name}\n{size}")])
        for number, (view, picture) in enumerate(zip(row.views, pictures, strict=True)):
            framed = ImageOps.expand(picture, FRAME, _colour(number, len(pictures)))
            heading = f"{number + 1}  {view.spec.name}, {view.spec.size} px"
            cells[-1].append(Cell(framed, "\n".join([heading, *view.caption()])))
    return contact_sheet(cells, tile, title)


def enlarged(picture: Image.Image) -> Image.Image:
    """A small view larger, pixel by pixel."""
    return ImageOps.scale(picture, max(1, ENLARGED // picture.width), Image.Resampling.NEAREST)


def with_boxes(row: Row, tile: int) -> Image.Image:
    """The original with the crop of each view, numbered; later views do not hide earlier ones."""
    picture = ImageOps.contain(row.original, (tile, tile), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    scale = picture.width / row.original.width
    for number, view in enumerate(row.views):
        top, left, height, width = (scale * length for length in view.params.box)
        colour = _colour(number, len(row.views))
        right, bottom = max(left, left + width - 1), max(top, top + height - 1)
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        # At one of two corners, so that numbers of views with a corner in common do not overlap.
        x, y = (left, top) if number % 2 == 0 else (right - 15, bottom - 15)
        draw.rectangle((x, y, x + 15, y + 15), colour)
        draw.text((x + 8, y + 8), str(number + 1), PAPER, font, anchor="mm")
    return picture


def _colour(number: int, count: int) -> str:
    """Colours far from one another for neighbouring numbers."""
    return f"hsv({360 * number / count:.0f}, 85%, {85 - 20 * (number % 2)}%)"
