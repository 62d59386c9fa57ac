"""`dino data stats`: range, mean and standard deviation of each channel, measured on the images.

A sample of the images, evenly spread, gives a sample of pixels each. All random numbers are keyed
by the image's index, so that the result depends neither on workers nor on their order.

Shapes: C channels, G side of the sample of one image, N images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
import tyro
from jaxtyping import Float64, UInt8
from rich.table import Table

from dino.data.images.image_errors import ImageError, count_defects
from dino.data.images.pixel_format import PixelFormat
from dino.data.loader import evaluation_loader, opened
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.data.views.random_streams import generator
from dino.files import UserError, atomic_json, check_output, read_json
from dino.progress import Console, bar
from dino.runtime import cores

SIDE = 32
"""G: of each image G x G pixels are drawn, with replacement."""

TAILS = (0.1, 99.9)
"""Percentiles of the values that become 0 and 255 where their type sets no range."""

Range: TypeAlias = Literal["auto", "full", "percentile"]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What was measured on the images of a source: a file of it is what `--stats` takes.

    Attributes:
        channels: C.
        page: of multi-page files.
        low: value of each channel that becomes 0; None for what the type offers.
        high: value of each channel that becomes 255.
        mean: of each channel, of pixels in 0..1 after that.
        std: of each channel.
        images: that were read.
        skipped: that could not be used.
        data: where they came from.
    """

    channels: int
    page: int
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    skipped: int
    data: str

    @property
    def format(self) -> PixelFormat:
        """What to expect of an image."""
        return PixelFormat(self.channels, self.page, self.low, self.high)

    def settings(self) -> dict[str, Any]:
        """The part that is a setting of a run: `dino.train.config.PixelSettings`."""
        names = ("channels", "page", "low", "high", "mean", "std")
        return {name: getattr(self, name) for name in names}


def read_stats(path: str | Path) -> Stats:
    """The file that `dino data stats` wrote.

    Raises:
        UserError: if it is missing or another file, naming what it lacks or has beyond.
    """
    content = read_json(path)
    names = {field.name for field in fields(Stats)}
    wrong = names ^ content.keys() if isinstance(content, dict) else names
    if wrong:
        raise UserError(
            f"{path} was not written by 'dino data stats': see its {', '.join(sorted(wrong))}"
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    stats = Stats(**values)
    try:
        _ = stats.format
        fits = stats.channels == len(stats.mean) == len(stats.std)
    except TypeError:
        fits = False
    if not fits:
        raise UserError(f"{path} was changed: measure anew with 'dino data stats'")
    return stats


# ---------------------------------------------------------------------------------- measuring
def measure(
    source: Source,
    pixels: PixelFormat,
    *,
    images: int = 2000,
    range: Range = "auto",
    workers: int = 0,
    progress: bool = True,
    data: str = "",
) -> tuple[Stats, list[ImageError]]:
    """Range, mean and standard deviation of each channel of a source.

    Args:
        source: the images.
        pixels: channels and page; its range, if it has one, is used as it is.
        images: at most so many are read, evenly spread over the source.
        range: "full" takes what the type of the values offers (of floats, what each image has),
            "percentile" the `TAILS` of the sampled values; "auto" is "full" if all images have 8
            bits and "percentile" otherwise.
        workers: processes that read images.
        progress: show a bar on a terminal.
        data: what to call the source in the result.

    Returns:
        What was measured, and the images that could not be used.

    Raises:
        UserError: if no image can be used, 8 bits and others are mixed, or a channel is constant.
    """
    if images < 1:
        raise UserError(f"statistics need 1 or more images, not {images}")
    # With any range given, a DICOM's window is not applied.
    reading = PixelFormat(pixels.channels, pixels.page, (0.0,), (1.0,))
    sampled = _Sampled(
        source, pixels, reading if range == "percentile" else pixels, spread(len(source), images)
    )
    values: list[Float64[np.ndarray, "C N"]] = []
    levels: list[UInt8[np.ndarray, "C N"]] = []
    deep: list[bool] = []
    names: list[str] = []
    skipped: list[ImageError] = []
    with bar("statistics", len(sampled), shown=progress) as advance:
        for part in evaluation_loader(sampled, torch.from_numpy, 16, workers):
            skipped += part.skipped
            advance(len(part.index) + len(part.skipped))
            for index, rows in zip(part.index.tolist(), part.images.numpy(), strict=True):
                names.append(sampled.path(index))
                deep.append(bool(rows[-1].any()))
                stored, made = np.split(rows[:-1].reshape(2 * pixels.channels, -1), 2)
                values.append(stored)
                levels.append(made.astype(np.uint8))
    if not values:
        raise UserError(f"none of {len(sampled):,} images can be used, the first: {skipped[0]}")
    chosen = pixels
    if pixels.low is None and (range == "percentile" or (range == "auto" and any(deep))):
        if not all(deep) and range == "auto":
            raise UserError(
                f"{names[deep.index(False)]} has 8 bits and {names[deep.index(True)]} has not: "
                "give images of one kind, or say --range full or --range percentile"
            )
        low, high = _bounds(np.concatenate(values, axis=1))
        chosen = PixelFormat(pixels.channels, pixels.page, low, high)
        levels = [chosen.levels(part[:, None]).squeeze(1) for part in values]
    mean, std = _moments(np.concatenate(levels, axis=1))
    result = Stats(
        **asdict(chosen), mean=mean, std=std, images=len(values), skipped=len(skipped), data=data
    )
    return result, skipped


def _bounds(values: Float64[np.ndarray, "C N"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The tails of each channel's finite values; its full range where the tails meet."""
    bounds = []
    for number, channel in enumerate(values):
        finite = channel[np.isfinite(channel)]
        if finite.size == 0:
            raise UserError(f"channel {number} has no finite value: leave it out")
        low, high = np.percentile(finite, TAILS).tolist()
        bounds.append((low, high) if low < high else (float(finite.min()), float(finite.max())))
        _vary(number, *bounds[-1])
    lows, highs = zip(*bounds, strict=True)
    return lows, highs


def _moments(levels: UInt8[np.ndarray, "C N"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for number, channel in enumerate(levels):
        _vary(number, int(channel.min()), int(channel.max()))
    shares = levels / 255
    return tuple(shares.mean(axis=1).tolist()), tuple(shares.std(axis=1).tolist())


def _vary(number: int, low: float, high: float) -> None:
    if not low < high:
        raise UserError(
            f"channel {number} is {low:g} in all sampled pixels: leave it out, since a network "
            "learns nothing from it"
        )


class _Sampled(Source):
    """Pixels of some images of a source: itself a `Source`, of arrays [2 C + 1, G, G].

    First the values as they are stored, then their levels, then 1 if they have other than 8 bits.
    """

    def __init__(
        self, source: Source, pixels: PixelFormat, reading: PixelFormat, indices: list[int]
    ) -> None:
        self.source, self.pixels, self.indices = source, pixels, indices
        self.stored = open_source(source, reading)

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        return self.source.path(self.indices[index])

    def __getitem__(self, index: int) -> Any:
        index = self.indices[index]
        with opened(self.stored, index) as image:
            values = image.values()
        values = self.pixels.fit(values, self.source.path(index))
        levels = self.pixels.levels(values)
        drawn = generator(0, 0, index).integers(values[0].size, size=(SIDE, SIDE))
        rows = [np.reshape(part, (len(part), -1))[:, drawn] for part in (values, levels)]
        deep = np.full((1, SIDE, SIDE), values.dtype.itemsize > 1)
        return np.concatenate([*rows, deep]).astype(np.float64)


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class StatsSettings:
    """Measure range, mean and standard deviation of each channel, for `dino pretrain --stats`."""

    data: tyro.conf.Positional[str]
    """Images: whatever `dino pretrain --data` takes."""
    channels: int = 3
    """C, 1 or more."""
    page: int = 0
    """Page of multi-page TIFFs, frame of DICOMs, from 0."""
    images: int = 2000
    """At most so many are read, evenly spread over all."""
    range: Range = "auto"
    """Of values that becomes 0 to 255. full: what their type offers (of floats, each image's own
    range); percentile: from the 0.1 to the 99.9 percentile of each channel; auto: full for images
    of 8 bits, percentile for all others."""
    low: tuple[float, ...] | None = None
    """Value that becomes 0, for each channel or one for all, instead of a measured one."""
    high: tuple[float, ...] | None = None
    """Value that becomes 255."""
    workers: int | None = None
    """Processes that read images; by default the cores there are, at most 16."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("stats.json")
    """Where the result goes as JSON."""


def run(settings: StatsSettings) -> Stats:
    """`dino data stats`: one table, and JSON that `--stats` takes.

    Raises:
        UserError: for data that are not there or cannot be measured (see `measure`).
    """
    check_output(settings.out)
    pixels = PixelFormat(settings.channels, settings.page, settings.low, settings.high)
    stats, skipped = measure(
        open_source(settings.data, pixels),
        pixels,
        images=settings.images,
        range=settings.range,
        workers=min(16, cores()) if settings.workers is None else settings.workers,
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
    console.print(f"{settings.out}", highlight=False, soft_wrap=True)
    return stats


def _table(stats: Stats) -> Table:
    table = Table(title=f"{stats.images:,} images of {stats.data}")
    for name in ("channel", "low", "high", "mean", "std"):
        table.add_column(name, justify="right")
    bounds = np.broadcast_to(
        np.array([stats.low or (np.nan,), stats.high or (np.nan,)]), (2, stats.channels)
    )
    for number, (low, high, mean, std) in enumerate(
        zip(*bounds.tolist(), stats.mean, stats.std, strict=True)
    ):
        ends = ("full", "full") if stats.low is None else (f"{low:.6g}", f"{high:.6g}")
        table.add_row(str(number), *ends, f"{mean:.4f}", f"{std:.4f}")
    return table
