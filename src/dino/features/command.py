"""What commands that run a network on images share: settings, provenance, files and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
import tyro
from rich.table import Table

from dino.features.cache import versions
from dino.files import UserError, cache_folder, replacing
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import Precision, describe
from dino.settings import Range
from dino.weights.load import fingerprint, load, untrained_like

TRAINED, UNTRAINED = "trained", "untrained"

PRINTED = 12
"""Most files whose paths `print_paths` prints one by one."""

Count = Annotated[int, Range(low=1, high=10**9)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(low=0, high=1)]
Seed = Annotated[int, Range(low=0, below=2**63)]
Workers = Annotated[int, Range(low=0, high=1000)]
Images = Annotated[str, tyro.conf.arg(metavar="PATH")]
OptionalImages = Annotated[str | None, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of every command that runs a network on images."""

    renamed: ClassVar[dict[str, str]] = {}
    """Former option -> its name now, both without dashes in front."""

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """Of the network: fp32, or bf16 for speed."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings(NetworkSettings):
    """Settings of every command that extracts features, which are cached on disk."""

    workers: Workers | None = None
    """Processes that read images; by default one for each core but one, at most 16."""
    store: Path | None = None
    """Folder of cached features, which are reused; by default in the cache (DINO_CACHE)."""

    def extraction(self) -> dict[str, Any]:
        """The keyword arguments of `features.extractor.extract` that these settings give."""
        store = self.store or cache_folder() / "features"
        return {"store": store, "workers": self.workers, "precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(NetworkSettings):
    """Settings of every command that measures networks side by side."""

    compare: tuple[str, ...] = ()
    """More weights to measure, such as those of a supervised network."""
    baseline: bool = False
    """Also measure the same network untrained."""

    def networks(self, device: torch.device, *, rgb: bool = False) -> dict[str, Backbone]:
        """All networks on the device: "trained", "untrained" and the others by their weights.

        `rgb`: the evaluation reads RGB images only.

        Raises:
            UserError: for weights that do not exist or are named twice, or networks that take
                other pixels than the first or than the evaluation.
        """
        named = {TRAINED: load(self.weights, device)}
        if self.baseline:
            named[UNTRAINED] = untrained_like(named[TRAINED])
        for weights in self.compare:
            if weights in named:
                raise UserError(f"--compare names {weights} twice")
            named[weights] = load(weights, device)
        for name, network in named.items():
            transform = network.preprocessing
            if rgb and len(transform.mean) != 3:
                raise UserError(
                    f"this evaluation reads RGB images, but the {name} network takes "
                    f"{len(transform.mean)} channels: measure it with knn, linear or logistic"
                )
            if transform.pixels != named[TRAINED].preprocessing.pixels:
                raise UserError(
                    f"{name} takes other pixels than {self.weights}: measure them one by one"
                )
        return named


def identities(networks: Mapping[str, Backbone]) -> dict[str, Any]:
    """Which weights each network has, for a result's JSON."""
    return {name: _identity(network) for name, network in networks.items()}


def _identity(network: Backbone) -> dict[str, Any]:
    origin = network.origin or {}
    return {"sha256": fingerprint(network), "architecture": network.spec, **origin}


def provenance(backbone: Backbone, settings: Any) -> dict[str, Any]:
    """Where a result comes from: weights by hash, preprocessing, settings, versions, device.

    Tuples are lists, as JSON gives them back.
    """
    origin = {
        "weights": _identity(backbone),
        "preprocessing": backbone.preprocessing.to_dict(),
        "settings": dataclasses.asdict(settings),
        "device": describe(next(backbone.parameters()).device),
        "versions": versions(),
    }
    return cast(dict[str, Any], json.loads(json.dumps(origin, default=str)))


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays by their names (.npz), atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def number_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table of named rows of numbers; `columns` begins with what the names are.

    Names may hold brackets: nothing here is read as rich's markup. Where space is short the names
    are wrapped, and no number is.
    """
    result = Table(title=title)
    for column in columns:
        number = bool(result.columns)
        justify: Literal["left", "right"] = "right" if number else "left"
        result.add_column(column, justify=justify, no_wrap=number, overflow="fold")
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def print_path(path: Path) -> None:
    """Print where something was written, in one line that can be copied."""
    Console().print(str(path), soft_wrap=True)


def print_paths(files: Sequence[str], others: Sequence[Path]) -> None:
    """Print the paths of all files, or how many they are, and the paths of the others."""
    console = Console()
    if len(files) > PRINTED:
        files = [f"{len(files):,} files, which {others[-1].name} lists, such as {files[0]}"]
    for path in (*files, *others):
        console.print(str(path), soft_wrap=True)
