"""`dino data preview`: the views that training makes of some images, and all their numbers.

The views are made by `dino.data.loader.PretrainLoader` and `dino.data.views.photometric.augment`,
as in training, and shown pixel by pixel; small ones are enlarged without smoothing.

Shapes: V views, B images, C channels, S side.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino.data.images.decode import as_picture, as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler, spread
from dino.data.sources.open import Source
from dino.data.views.photometric import augment
from dino.data.views.random_streams import ViewParams, draw_views, generator
from dino.data.views.view_spec import JITTER_OPERATIONS, NEVER_SOLARIZE, ViewSpec, expand
from dino.files import UserError

MARGIN, TEXT, LINE = 14, 12, 16
"""Pixels between pictures, height of letters, height of a line of them."""

ORIGINAL, NARROW, ENLARGED = 300, 150, 128
"""Longest side of an original and least width of a view's column in pixels; views smaller than half
of `ENLARGED` are enlarged up to it."""

INK, SOFT, PAPER = (30, 30, 34), (110, 110, 118), (255, 255, 255)


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


class _Chosen(EpochSampler):
    """One batch of images that were chosen by hand."""

    def __init__(self, epoch: int, indices: Sequence[int]) -> None:
        self.epoch, self.indices, self.start_step = epoch, indices, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield [(self.epoch, index) for index in self.indices]


def make_rows(
    source: Source,
    specs: Sequence[ViewSpec],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    images: int = 4,
    epoch: int = 0,
    seed: int = 0,
) -> tuple[list[Row], list[ImageError]]:
    """The views of some images, evenly spread over a source, as a run with this seed makes them.

    Args:
        source: the images.
        specs: the views of each; the first two are the global ones.
        mean: of each channel, for pixels in 0..1.
        std: of each channel.
        images: how many, at least 1.
        epoch: in which the views would be made, counted from 0.
        seed: of the run.

    Returns:
        The rows, and the images in whose place others are shown, as in training.

    Raises:
        UserError: if no image can be used, or there is none to show.
    """
    if images < 1 or epoch < 0:
        raise UserError(f"a preview needs images >= 1 and epoch >= 0, not {images} and {epoch}")
    channels, chosen = len(mean), spread(len(source), images)
    [batch] = PretrainLoader(source, specs, _Chosen(epoch, chosen), seed, channels)
    pictures = [
        view
        for group in batch.groups
        for view in _shown(
            augment(group.images.flatten(0, 1), group.params.flatten(0, 1), mean, std),
            mean,
            std,
        ).unflatten(0, group.images.shape[:2])
    ]
    kinds = [spec.for_channels(channels) for spec in specs]
    rows = []
    for place, (index, taken) in enumerate(zip(chosen, batch.index.tolist(), strict=True)):
        full = as_pixels(source[taken])
        height, width = full.shape[1:]
        drawn = draw_views(kinds, height, width, generator(seed, epoch, index))
        views = [
            View(spec, params, as_picture(picture[place]))
            for spec, params, picture in zip(expand(kinds), drawn, pictures, strict=True)
        ]
        rows.append(Row(source.path(taken), as_picture(full), views))
    return rows, batch.skipped


def _shown(images: Float[Tensor, "N C S S"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images as levels from 0 to 255."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    return ((images * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------- drawing
def contact_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """Each image, its crops drawn in, and its views with the numbers they come from.

    Args:
        rows: at least one, all with views of the same kinds.
        title: the line on top.
    """
    views = rows[0].views
    zooms = [max(1, ENLARGED // view.spec.size) for view in views]
    sides = [view.spec.size * zoom for view, zoom in zip(views, zooms, strict=True)]
    columns = [max(side, NARROW) + MARGIN for side in sides]
    width = ORIGINAL + 2 * MARGIN + sum(columns)
    heights = [_height(row, sides) for row in rows]
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(heights)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    draw.text((MARGIN, MARGIN), title, SOFT, font)
    top = 2 * MARGIN + LINE
    for row, height in zip(rows, heights, strict=True):
        size = f"{row.original.width} x {row.original.height}"
        sheet.paste(_with_boxes(row), (MARGIN, top))
        below = top + _fitted(row.original.size, ORIGINAL)[1] + 4
        draw.text((MARGIN, below), _ending(row.name, font), INK, font)
        draw.text((MARGIN, below + LINE), size, SOFT, font)
        left = ORIGINAL + 2 * MARGIN
        for number, (view, side, column) in enumerate(zip(row.views, sides, columns, strict=True)):
            colour = _colour(number, len(views))
            picture = view.picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            draw.rectangle((left, top - 5, left + side - 1, top - 2), colour)
            heading = f"{number + 1}  {view.spec.name}, {view.spec.size} px"
            draw.text((left, top + side + 4), heading, INK, font)
            for place, line in enumerate(view.caption(), start=1):
                draw.text((left, top + side + 4 + place * LINE), line, SOFT, font)
            left += column
        top += height
    return sheet


def _height(row: Row, sides: Sequence[int]) -> int:
    original = _fitted(row.original.size, ORIGINAL)[1] + 2 * LINE
    below = [len(view.caption()) + 1 for view in row.views]
    views = [side + lines * LINE for side, lines in zip(sides, below, strict=True)]
    return max(original, *views) + 2 * MARGIN


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _ending(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A name, or as much of its end as fits below an original."""
    short = name
    while font.getlength(short) > ORIGINAL:
        name = name[1:]
        short = f"...{name}"
    return short


def _with_boxes(row: Row) -> Image.Image:
    """The original with the crop of each view, numbered; later views do not hide earlier ones."""
    size = _fitted(row.original.size, ORIGINAL)
    picture = row.original.resize(size, Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    scale = size[0] / row.original.width
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


def _colour(number: int, count: int) -> tuple[int, int, int]:
    """Colours far from one another for neighbouring numbers."""
    red, green, blue = colorsys.hsv_to_rgb(number / count, 0.85, 0.85 - 0.2 * (number % 2))
    return round(255 * red), round(255 * green), round(255 * blue)
