"""What all jobs share: settings, networks with their baselines, and a folder with the result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table

from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.named_inputs import NamedInput, named_inputs
from dino.data.sources.open import Source
from dino.features.command import (
    TRAINED,
    ComparisonSettings,
    Count,
    ExtractionSettings,
    Images,
    identities,
    print_path,
    provenance,
)
from dino.features.extractor import extract
from dino.features.index import Index, open_index
from dino.features.raw_pixels import RawPixels
from dino.features.table import FeatureTable
from dino.files import UserError, atomic_json, check_output, check_outside
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group, ranks

PIXELS = "pixels"


@dataclass(frozen=True, kw_only=True)
class JobSettings(ComparisonSettings):
    """Settings of every job."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of all that is written."""
    baseline: bool = False
    """Also do it with the untrained network and with raw pixels, and compare."""

    def networks(self, device: torch.device, *, rgb: bool = False) -> dict[str, Backbone]:
        """As `ComparisonSettings.networks`, with `baseline` also "pixels"."""
        named = super().networks(device, rgb=rgb)
        if self.baseline:
            named[PIXELS] = RawPixels(named[TRAINED]).eval()
        return named


@dataclass(frozen=True, kw_only=True)
class FeatureJobSettings(JobSettings, ExtractionSettings):
    """Settings of every job that is done with one feature an image."""

    data: Images
    """Images: a folder, a list (.txt, .csv, .tsv, .parquet), or demo."""
    batch: Count = 64
    """Images at a time."""

    def table(self, network: Backbone, source: Source, title: str) -> FeatureTable:
        """The features of a source; `title` is that of the progress bar."""
        return extract(network, source, batch=self.batch, title=title, **self.extraction())


@dataclass(frozen=True, kw_only=True)
class IndexedJobSettings(FeatureJobSettings):
    """Settings of every job that can be done with an index."""

    index: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the index of --data, kept up to date and shared by jobs."""

    def images(self, name: str, network: Backbone, source: Source) -> FeatureTable:
        """The features of --data; those of the first network from the index, if there is one."""
        if self.index is None or name != TRAINED:
            return self.table(network, source, name)
        if ranks().world > 1:
            raise UserError("an index is for one process: leave out torchrun, or --index")
        return indexed_table(self.opened_index(network), source)

    def opened_index(self, network: Backbone) -> Index:
        """The index of --data, up to date; by default in the cache."""
        options = {"batch": self.batch, **self.extraction()}
        return open_index(network, self.data, self.index, **options)


def indexed_table(index: Index, source: Source) -> FeatureTable:
    """The features of an index as a table of its source."""
    place = {os.path.abspath(source.path(i)): i for i in range(len(source))}  # noqa: PTH100
    paths = [*index.paths]
    indices = [place[path] for path in paths]
    labels = source.labels
    return FeatureTable(
        features=index.features,
        labels=None if labels is None else torch.tensor([labels[i] for i in indices]),
        paths=paths,
        classes=source.classes,
        skipped=index.skipped,
        indices=indices,
    )


@dataclass(frozen=True)
class Job:
    """A job that is being done.

    Attributes:
        networks: by name, on the device; "trained" is the first.
        out: the folder of all that is written.
        path: the JSON file of the result.
        origin: where the result comes from, as JSON takes it.
    """

    networks: dict[str, Backbone]
    out: Path
    path: Path
    origin: dict[str, Any]

    @property
    def network(self) -> Backbone:
        """The network whose result is written."""
        return self.networks[TRAINED]

    @property
    def pixels(self) -> PixelFormat:
        """The pixels that all networks take."""
        return self.network.preprocessing.pixels

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.network.parameters()).device

    def report(
        self, content: Mapping[str, Any], *printed: Table | str, files: Sequence[Path] = ()
    ) -> None:
        """Write the result, then print tables, sentences and paths (main process only)."""
        if not ranks().main:
            return
        written = datetime.now(timezone.utc).isoformat(timespec="seconds")
        atomic_json(self.path, {**content, "written": written, **self.origin})
        for item in printed:
            Console().print(item, soft_wrap=isinstance(item, str))
        for path in (self.path, *files):
            print_path(path)


@contextmanager
def job(name: str, settings: JobSettings, *images: str | None) -> Iterator[Job]:
    """Check where the result goes, join the process group and load all networks.

    Args:
        name: of the job, by which its JSON file is named.
        settings: of the command.
        images: all images that it reads, in which nothing may be written.

    Raises:
        UserError: for a folder that cannot be written, or weights that cannot be used.
    """
    check_output(settings.out, folder=True)
    for one in images:
        check_outside(settings.out, one)
    device = pick_device(settings.device)
    with process_group(device):
        networks = settings.networks(device)
        origin = {
            "job": name,
            "networks": identities(networks),
            **provenance(networks[TRAINED], settings),
        }
        yield Job(networks, settings.out, settings.out / f"{name}.json", origin)


def named_images(words: Sequence[str], pixels: PixelFormat) -> list[NamedInput]:
    """The images that some words of a command line name, see `named_inputs`; no videos.

    Raises:
        UserError: if there are none, or one is a video.
    """
    found = named_inputs(words, pixels)
    if videos := [one.path for one in found if one.source is None]:
        raise UserError(f"{videos[0]} is a video: save some of its frames as images")
    return found
