"""Pictures of the attention of one image: overlays, masks, the composite of Fig. 3, and sheets.

Shapes: n heads, h w patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.images.contact_sheet import PAPER, TEXT, Cell, contact_sheet
from dino.data.images.map_overlay import (
    CATEGORIES,
    Color,
    composite,
    cut_out,
    outlined,
    overlay,
    ringed,
    stencil,
)
from dino.models.attention import mass_mask
from dino.show.legends import below, color_bar, letters_for, strip_height, swatches

TILE, COLUMNS = 240, 6
"""Side of a picture with its legend in a sheet, in pixels, and how many heads stand in a row."""

Point = tuple[int, int]
"""Column and row of a pixel."""


@dataclass(frozen=True)
class HeadMaps:
    """The attention of one query to the patches of one image.

    Attributes:
        maps: after the softmax; each sums to at most 1.
        heads: number of each map's head in its block, from 0; empty for the mean of heads.
        mass: share of each map that its mask holds.
    """

    maps: Float[Tensor, "n h w"]
    heads: Sequence[int]
    mass: float

    @cached_property
    def masks(self) -> Bool[Tensor, "n h w"]:
        """The fewest patches that hold the mass of each map."""
        return mass_mask(self.maps, self.mass)

    @cached_property
    def areas(self) -> list[float]:
        """The share of all patches that each mask covers: small for concentrated attention."""
        return self.masks.double().mean(dim=(1, 2)).tolist()

    @cached_property
    def mean(self) -> HeadMaps:
        """The mean over heads, as one map."""
        return HeadMaps(self.maps.mean(dim=0, keepdim=True), (), self.mass)

    def one(self, place: int) -> HeadMaps:
        """One map alone."""
        return HeadMaps(self.maps[place, None], [self.heads[place]], self.mass)

    @cached_property
    def best(self) -> int:
        """The place of the map whose mask is smallest, the first among equals.

        Without ground truth no criterion determines which head shows the object. This one finds
        the most concentrated attention, which may also be that of a single odd patch.
        """
        return self.areas.index(min(self.areas))

    @cached_property
    def colors(self) -> dict[int, Color]:
        """The colours in the composite by place: of all maps, or of the most concentrated ones."""
        ranking = sorted(range(len(self.heads)), key=lambda place: self.areas[place])
        return dict(zip(sorted(ranking[: len(CATEGORIES)]), CATEGORIES, strict=False))

    def composite(self, image: Image.Image) -> Image.Image:
        """A colour for each head over the image (Fig. 3)."""
        places = list(self.colors)
        return composite(image, self.maps[places], self.masks[places], [*self.colors.values()])

    def legend(self, letters: int) -> Image.Image:
        """The colours in the composite."""
        labels = {str(self.heads[place]): color for place, color in self.colors.items()}
        return swatches("heads", labels, letters)


class Shown(NamedTuple):
    """A picture for a file of its own.

    Attributes:
        name: what it shows, for the name of its file.
        picture: of the size of the image.
        legend: of its colours; None for black and white masks.
    """

    name: str
    picture: Image.Image
    legend: Image.Image | None = None


def pictures(
    image: Image.Image,
    found: HeadMaps,
    kinds: Sequence[str],
    query: Point | None = None,
    best: int | None = None,
) -> Iterator[Shown]:
    """The pictures of an image that are requested, each under another name.

    Args:
        image: the full image.
        found: its attention.
        kinds: some of "mean", "best", "heads" (overlays of the mean, of the most concentrated head
            and of each head), "masks" (of the mean and of each head) and "composite"; others are
            ignored.
        query: pixel to mark.
        best: place of the head that takes the place of `found.best`.
    """
    maps = {"mean": found.mean.maps[0], "best": found.maps[found.best if best is None else best]}
    masks = {"mean": found.mean.masks[0]}
    for place, head in enumerate(found.heads):
        maps[f"head{head}"], masks[f"head{head}"] = found.maps[place], found.masks[place]
    letters = letters_for(image.width)
    bar = color_bar("least", "most attention", letters)
    for name, values in maps.items():
        if (name if name in ("mean", "best") else "heads") in kinds:
            yield Shown(name, _marked(overlay(image, values), image, query), bar)
    for name, mask in masks.items() if "masks" in kinds else ():
        yield Shown(f"{name}-mask", stencil(mask, image.size))
    if "composite" in kinds:
        picture = _marked(found.composite(image), image, query)
        yield Shown("composite", picture, found.legend(letters))


def _marked(picture: Image.Image, image: Image.Image, query: Point | None) -> Image.Image:
    """A picture of `image`, of any size, with a pixel of the image marked."""
    if query is None:
        return picture
    x, y = ((place + 0.5) * picture.width / image.width for place in query)
    return ringed(picture, x, y)


# ------------------------------------------------------------------------------------- sheets
def sheet(rows: Sequence[Sequence[Cell]], title: str) -> Image.Image:
    """Rows of cells on a sheet."""
    return contact_sheet(rows, TILE, title, compact=True)


def summary(
    image: Image.Image, name: str, found: HeadMaps, query: Point | None = None
) -> list[Cell]:
    """Cells with the image and its mean attention, mask, most concentrated head and composite."""
    small, mean, best = _small(image), found.mean, found.one(found.best)
    blank = Image.new("RGB", (1, strip_height(TEXT)), PAPER)  # as high as the legends beside it
    left_out = len(found.heads) - len(found.colors)
    note = f"without the {left_out} least concentrated" if left_out else "a colour for each head"
    cut = below(cut_out(small, mean.masks[0]), blank)
    size = f"{image.width} x {image.height} px"
    return [
        Cell(below(_marked(small, image, query), blank), f"{name}\n{size}"),
        _map_cell(small, mean, "mean of the heads"),
        Cell(cut, f"mask of the mean\n{_area(mean)}"),
        _map_cell(small, best, f"most concentrated: head {best.heads[0]}"),
        Cell(below(found.composite(small), found.legend(TEXT)), f"composite of the heads\n{note}"),
    ]


def head_rows(image: Image.Image, found: HeadMaps) -> list[list[Cell]]:
    """Cells with each head's attention."""
    small = _small(image)
    cells = [_map_cell(small, found.one(place), f"head {n}") for place, n in enumerate(found.heads)]
    return [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]


def _small(image: Image.Image) -> Image.Image:
    """The image as large as a tile and a legend below it allow."""
    return ImageOps.contain(image, (TILE, TILE - strip_height(TEXT)), Image.Resampling.LANCZOS)


def _map_cell(small: Image.Image, found: HeadMaps, caption: str) -> Cell:
    """An overlay of a single map with the border of its mask and its range of values."""
    values = found.maps[0]
    picture = outlined(overlay(small, values), found.masks[0])
    bar = color_bar(*_percent(float(values.min()), float(values.max())), TEXT)
    return Cell(below(picture, bar), f"{caption}\n{_area(found)}")


def _percent(low: float, high: float) -> tuple[str, str]:
    """Both with as many decimals as give the larger two digits."""
    decimals = max(0, 1 - math.floor(math.log10(max(100 * high, 0.01))))
    return f"{100 * low:.{decimals}f} %", f"{100 * high:.{decimals}f} %"


def _area(found: HeadMaps) -> str:
    return f"{100 * found.mass:g} % in {100 * found.areas[0]:.1f} % of the patches"
