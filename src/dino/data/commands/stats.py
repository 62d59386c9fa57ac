"""`dino data stats`: range, mean and standard deviation of each channel, measured on the images.

A sample of the images, evenly spread, gives a sample of pixels each. All random numbers are keyed
by the image's index, so that the result depends neither on workers nor on their order.

Shapes: C channels, G side of the sample of one image, N sampled pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
import tyro
from jaxtyping import Float64
from rich.table import Table
from torch import Tensor

from dino.data.images.image_errors import ImageError, count_defects
from dino.data.images.pixel_format import NoData, PixelFormat
from dino.data.loader import image_batches
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.data.views.random_streams import generator
from dino.files import UserError, atomic_json, check_output, read_json
from dino.progress import Console, bar
from dino.settings import Range, parsed

SIDE = 32
"""G: of each image G x G pixels are drawn, with replacement."""

TAILS = (0.1, 99.9)
"""Percentiles of the values that become 0 and 255 where their type sets no range."""

RangeChoice: TypeAlias = Literal["auto", "full", "percentile"]


@dataclass(frozen=True, kw_only=True)
class Stats(PixelFormat):
    """The pixel format of a source with its moments: a file of it is what `--stats` takes.

    Attributes:
        mean: of each channel, of levels in 0..1.
        std: of each channel.
        images: number of images that were read.
        skipped: number of images that could not be used.
        data: where they came from.
        nodata_share: share of the sampled pixels without data, of each channel.
    """

    mean: tuple[float, ...]
    std: Annotated[tuple[float, ...], Range(above=0)]
    images: int
    skipped: int
    data: str
    nodata_share: tuple[float, ...] = ()

    @property
    def format(self) -> PixelFormat:
        """The pixel format alone."""
        return PixelFormat(self.channels, self.page, self.low, self.high, self.nodata)

    def settings(self) -> dict[str, Any]:
        """The values of `dino.train.config.PixelSettings`."""
        return {**asdict(self.format), "mean": self.mean, "std": self.std}


def read_stats(path: str | Path) -> Stats:
    """The file that `dino data stats` wrote.

    Raises:
        UserError: if it is missing or another file, naming what does not fit.
    """
    return parsed(Stats, read_json(path), path)


# ---------------------------------------------------------------------------------- measuring
def measure(
    source: Source,
    pixels: PixelFormat,
    *,
    images: int = 2000,
    range: RangeChoice = "auto",
    workers: int | None = 0,
    data: str = "",
) -> tuple[Stats, list[ImageError]]:
    """Range, mean and standard deviation of each channel of at most `images` images, evenly spread.

    The range is that of `pixels` if it has one. Else, "full" takes what the type of the values
    offers (of floats, what each image has), "percentile" the `TAILS` of the sampled values; "auto"
    is "full" if all images have 8 bits and "percentile" otherwise. `data` names the source.

    Returns:
        The statistics, and the images that could not be used.

    Raises:
        UserError: if no image can be used, 8 bits and others are mixed, or a channel is constant.
    """
    # With any range given, a DICOM's window is not applied.
    no_window = replace(pixels, low=(0.0,), high=(1.0,))
    source = open_source(source, no_window if range == "percentile" else pixels)
    read, indices = partial(_pixel_sample, pixels=pixels), spread(len(source), images)
    skipped: list[ImageError] = []
    names: list[str] = []
    samples: list[Tensor] = []
    with bar("statistics", len(indices)) as advance:
        for batch in image_batches(source, read, workers=workers, indices=indices):
            advance(len(batch.index) + len(batch.skipped))
            skipped += batch.skipped
            names += map(source.path, batch.index.tolist())
            samples += batch.images.flatten(2)
    if not names:
        raise UserError(f"none of {len(indices):,} images can be used, the first: {skipped[0]}")
    values, levels, valid, (deep, inverted) = np.split(
        torch.cat(samples, dim=1).numpy(), [pixels.channels * part for part in (1, 2, 3)]
    )
    valid, deep, inverted = valid > 0, deep[:: SIDE**2] > 0, inverted > 0
    if pixels.low is None and (range == "percentile" or (range == "auto" and deep.any())):
        if not deep.all() and range == "auto":
            raise UserError(
                f"{names[deep.argmin()]} has 8 bits and {names[deep.argmax()]} has not: "
                "give images of one kind, or say --range full or --range percentile"
            )
        pairs = zip(values, valid, strict=True)
        bounds = [_bounds(number, channel[known]) for number, (channel, known) in enumerate(pairs)]
        low, high = zip(*bounds, strict=True)
        pixels = replace(pixels, low=low, high=high)
        levels = pixels.levels(values[:, None]).squeeze(1)
        levels = np.where(inverted, 255 - levels, levels)
    shares = [channel[known] / 255 for channel, known in zip(levels, valid, strict=True)]
    for number, share in enumerate(shares):
        if share.size == 0:
            raise UserError(f"no sampled pixel of channel {number} holds data: leave it out")
        _check_variation(number, 255 * share.min(), 255 * share.max())
    stats = Stats(
        **asdict(pixels),
        mean=tuple(float(share.mean()) for share in shares),
        std=tuple(float(share.std()) for share in shares),
        images=len(names),
        skipped=len(skipped),
        data=data,
        nodata_share=tuple((~valid).mean(axis=1).tolist()),
    )
    return stats, skipped


def _bounds(number: int, channel: Float64[np.ndarray, " N"]) -> tuple[float, float]:
    """The tails of a channel's finite values; its full range where the tails are equal."""
    finite = channel[np.isfinite(channel)]
    if finite.size == 0:
        raise UserError(f"channel {number} has no finite value: leave it out")
    low, high = np.percentile(finite, TAILS).tolist()
    if not low < high:
        low, high = float(finite.min()), float(finite.max())
    _check_variation(number, low, high)
    return low, high


def _check_variation(number: int, low: float, high: float) -> None:
    if not low < high:
        raise UserError(
            f"channel {number} is {low:g} in all sampled pixels: leave it out, since a network "
            "learns nothing from it"
        )


def _pixel_sample(
    source: Source, index: int, pixels: PixelFormat
) -> Float64[Tensor, "rows {SIDE} {SIDE}"]:
    """Sampled pixels of an image, 3 C + 2 rows.

    First the values as they are stored, then their levels, then 1 where they hold data; then 1 if
    they have other than 8 bits and no window, and 1 if the smallest is white.
    """
    with source.open(index) as image:
        values, info = pixels.with_channels(image.values(), source.path(index)), image.info
    drawn = generator(0, 0, index).integers(values[0].size, size=(SIDE, SIDE))
    valid = np.broadcast_to(pixels.valid(values, info), values.shape)
    rows = [
        np.reshape(channels, (len(channels), -1))[:, drawn]
        for channels in (values, pixels.levels(values, info), valid)
    ]
    deep = values.dtype.itemsize > 1 and info.window is None
    flags = [np.full((1, SIDE, SIDE), flag) for flag in (deep, info.inverted)]
    return torch.from_numpy(np.concatenate([*rows, *flags], dtype=np.float64))


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class StatsSettings:
    """Measure range, mean and standard deviation of each channel, for `dino pretrain --stats`."""

    data: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Images: whatever `dino pretrain --data` takes."""
    channels: Annotated[int, Range(low=1)] = 3
    """C."""
    page: Annotated[int, Range(low=0)] | None = None
    """Page of multi-page TIFFs, frame of DICOMs, from 0; the first of C where pages are grey."""
    images: Annotated[int, Range(low=1)] = 2000
    """At most so many are read, evenly spread over all."""
    range: RangeChoice = "auto"
    """Of values that becomes 0 to 255. full: what their type offers (of floats, the range of each
    image); percentile: from the 0.1 to the 99.9 percentile of each channel; auto: full for images
    of 8 bits, percentile for all others."""
    low: tuple[float, ...] | None = None
    """Value that becomes 0, for each channel or one for all, instead of a measured one."""
    high: tuple[float, ...] | None = None
    """Value that becomes 255."""
    nodata: NoData = None
    """Value of pixels without data (always NaN), which are left out; None for what files say."""
    workers: Annotated[int, Range(low=0, high=1000)] | None = None
    """Processes that read images; by default one for each core but one, at most 16."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("stats.json")
    """Where the result goes as JSON."""


def run(settings: StatsSettings) -> Stats:
    """`dino data stats`: one table, and JSON that `--stats` takes.

    Raises:
        UserError: for data that do not exist or cannot be measured (see `measure`).
    """
    check_output(settings.out)
    pixels = PixelFormat(
        settings.channels, settings.page, settings.low, settings.high, settings.nodata
    )
    stats, skipped = measure(
        open_source(settings.data, pixels),
        pixels,
        images=settings.images,
        range=settings.range,
        workers=settings.workers,
        data=settings.data,
    )
    atomic_json(settings.out, asdict(stats))
    console = Console()
    console.print(_table(stats))
    if skipped:
        console.print(
            f"{len(skipped):,} images could not be used "
            f"({count_defects(error.defect for error in skipped)}), the first: {skipped[0]}",
            style="yellow",
            soft_wrap=True,
        )
    console.print(f"{settings.out}", soft_wrap=True)
    return stats


def _table(stats: Stats) -> Table:
    table = Table(title=f"{stats.images:,} images of {stats.data}")
    without = any(stats.nodata_share)
    for name in ("channel", "low", "high", "mean", "std", *["no data"] * without):
        table.add_column(name, justify="right")
    for number, moments in enumerate(zip(stats.mean, stats.std, strict=True)):
        bounds = (
            "full" if values is None else f"{np.resize(values, stats.channels)[number]:.6g}"
            for values in (stats.low, stats.high)
        )
        shares = [f"{stats.nodata_share[number]:.1%}"] if without else []
        table.add_row(str(number), *bounds, *(f"{moment:.4f}" for moment in moments), *shares)
    return table
