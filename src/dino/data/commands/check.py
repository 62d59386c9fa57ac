"""`dino data check`: every image is read beforehand, and what cannot be used is listed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Int64
from rich.table import Table
from torch import Tensor

from dino.data.commands.stats import read_stats
from dino.data.images.bit_depth import Stored
from dino.data.images.image_errors import count_each, write_list
from dino.data.images.other_formats import REMEDIES
from dino.data.images.pixel_format import PixelFormat
from dino.data.loader import decoded, image_batches
from dino.data.sources.open import Source, open_source
from dino.files import UserError, atomic_json, check_output
from dino.progress import Console, bar
from dino.settings import Range

SMALL = 224
"""Pixels on the shorter side below which the global views of most recipes enlarge an image."""


@dataclass(frozen=True)
class Checked:
    """What the images of a source are like.

    Attributes:
        images: number of all of them.
        bad: defect and reason of each that cannot be used, by its path.
        sizes: (height, width) of each that can, upright.
        stored: how many are stored as what, the most frequent first.
        repeated: how many have the very pixels of an earlier one.
        left_out: number of files beside the images that are not read, by their ending.
    """

    images: int
    bad: dict[str, tuple[str, str]]
    sizes: list[tuple[int, int]]
    stored: dict[Stored, int]
    repeated: int
    left_out: Mapping[str, int]

    @property
    def defects(self) -> dict[str, int]:
        """How many have which defect, the most frequent first."""
        return count_each(defect for defect, _ in self.bad.values())

    def summary(self) -> dict[str, Any]:
        """All of it but the list, as JSON."""
        short = sorted(min(size) for size in self.sizes)
        long = sorted(max(size) for size in self.sizes)
        return {
            "images": self.images,
            "usable": len(self.sizes),
            "defects": self.defects,
            "short_side": _extremes(short),
            "long_side": _extremes(long),
            f"below_{SMALL}": sum(side < SMALL for side in short),
            "stored": {str(kind): count for kind, count in self.stored.items()},
            "repeated": self.repeated,
            "left_out": dict(self.left_out),
        }


def _extremes(ordered: Sequence[int]) -> list[int]:
    """Smallest, median and largest."""
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else []


def check(source: Source, pixels: PixelFormat, *, workers: int | None = 0) -> Checked:
    """Read every image of a source as training would, but never smaller than it is."""
    bad: dict[str, tuple[str, str]] = {}
    sizes: list[tuple[int, int]] = []
    stored: Counter[Stored] = Counter()
    hashes: set[tuple[int, ...]] = set()
    read = partial(_facts, channels=pixels.channels)
    with bar("images", len(source)) as advance:
        for batch in image_batches(source, read, workers=workers):
            advance(len(batch.index) + len(batch.skipped))
            bad |= {error.path: (error.defect, error.reason) for error in batch.skipped}
            for height, width, channels, bits, floating, *words in batch.images.flatten(1).tolist():
                sizes.append((height, width))
                stored[Stored(channels, bits, bool(floating))] += 1
                hashes.add(tuple(words))
    repeated = len(sizes) - len(hashes)
    return Checked(len(source), bad, sizes, dict(stored.most_common()), repeated, source.left_out)


def _facts(source: Source, index: int, channels: int) -> Int64[Tensor, "7 1 1"]:
    """Height, width, what an image is stored as (`Stored`), and two words of a hash of its pixels.

    Raises:
        ImageError: for another number of channels.
    """
    with source.open(index) as image:
        stored = image.stored
        levels = decoded(image, source.path(index), channels).contiguous().numpy(force=True)
    digest = hashlib.blake2b(levels.data, digest_size=16, salt=b"%d" % levels.shape[2]).digest()
    facts = (*levels.shape[1:], *stored, *np.frombuffer(digest, np.int64))
    return torch.tensor(facts, dtype=torch.int64)[:, None, None]


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every image and list those that cannot be used; exit status 1 if there are any."""

    data: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Images: whatever `dino pretrain --data` takes."""
    channels: Annotated[int, Range(low=1)] | None = None
    """C that they must have; by default 3."""
    page: Annotated[int, Range(low=0)] | None = None
    """Page of multi-page TIFFs, frame of DICOMs, from 0; the first of C where pages are grey."""
    stats: Path | None = None
    """Channels, page and range of values from this file of `dino data stats` instead."""
    workers: Annotated[int, Range(low=0, high=1000)] | None = None
    """Processes that read images; by default one for each core but one, at most 16."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.csv")] = Path("check.csv")
    """The list: path, defect and reason of each; a summary goes beside it as JSON."""


def run(settings: Check) -> Checked:
    """`dino data check`: tables of defects and of what was found, and the path of the list.

    Raises:
        UserError: for data that do not exist, or settings that contradict one another.
    """
    check_output(settings.out, (".csv",), siblings=(".json",))
    if settings.stats is None:
        channels = 3 if settings.channels is None else settings.channels
        pixels = PixelFormat(channels, settings.page)
    elif (settings.channels, settings.page) != (None, None):
        raise UserError("--stats says channels and page: leave out --channels and --page")
    else:
        pixels = read_stats(settings.stats).format
    checked = check(open_source(settings.data, pixels), pixels, workers=settings.workers)
    write_list(settings.out, checked.bad)
    summary = checked.summary()
    about = {"data": settings.data, "pixels": asdict(pixels)}
    atomic_json(settings.out.with_suffix(".json"), {**summary, **about})
    console = Console()
    console.print(_table(checked, summary))
    console.print(f"{settings.out}", soft_wrap=True)
    return checked


def _table(checked: Checked, summary: dict[str, Any]) -> Table:
    table = Table(title="images", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("usable", f"{len(checked.sizes):,}")
    for defect, count in checked.defects.items():
        table.add_row(defect, f"{count:,}", style="red")
    table.add_row("all", f"{checked.images:,}", end_section=True)
    for ending, count in sorted(checked.left_out.items(), key=lambda item: -item[1]):
        remedy = f" ({REMEDIES[ending]})" if ending in REMEDIES else ""
        label = f"left out, no image: {ending or 'no ending'}{remedy}"
        table.add_row(label, f"{count:,}", style="yellow")
    table.add_section()
    for kind, count in checked.stored.items():
        table.add_row(f"stored as {kind}", f"{count:,}")
    for side in ("short", "long"):
        if extremes := summary[f"{side}_side"]:
            words = " / ".join(f"{pixels:,}" for pixels in extremes)
            table.add_row(f"{side} side in pixels: smallest / median / largest", words)
    table.add_row(f"short side below {SMALL} pixels", f"{summary[f'below_{SMALL}']:,}")
    table.add_row("same pixels as an earlier image", f"{checked.repeated:,}")
    return table
