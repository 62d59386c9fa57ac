"""What evaluation commands share: settings, networks, one table, one file of JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from rich.table import Table

from dino.data.images.pixel_format import PixelFormat
from dino.evaluate.features.cache import versions
from dino.files import UserError, atomic_json, cache_folder, check_output
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import Precision, describe, pick_device, process_group, ranks
from dino.settings import Range
from dino.weights.load import fingerprint, load, untrained_like

TRAINED, UNTRAINED = "trained", "untrained"

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
class EvaluationSettings(NetworkSettings):
    """Settings of every evaluation."""

    compare: tuple[str, ...] = ()
    """More weights to measure, such as those of a supervised network."""
    baseline: bool = False
    """Also measure the same network untrained."""
    out: Path | None = None
    """The result as JSON; by default beside the weights."""

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


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluationSettings(EvaluationSettings, ExtractionSettings):
    """Settings of every evaluation of extracted features."""


@dataclass(frozen=True)
class EvaluationRun:
    """A running evaluation command.

    Attributes:
        networks: by name, on the device.
        path: the JSON file of the result.
        origin: where the result comes from, as JSON takes it.
    """

    networks: dict[str, Backbone]
    path: Path
    origin: dict[str, Any]

    @property
    def pixels(self) -> PixelFormat:
        """The pixels that all networks take."""
        return self.networks[TRAINED].preprocessing.pixels

    def report(self, content: Mapping[str, Any], *printed: Table | str) -> None:
        """Write `content` with its origin, then print tables and sentences (main process only)."""
        if ranks().main:
            atomic_json(self.path, {**content, **self.origin})
            for item in printed:
                Console().print(item)


@contextmanager
def evaluation_run(
    name: str, settings: EvaluationSettings, *, rgb: bool = False
) -> Iterator[EvaluationRun]:
    """Check where the result `name` goes, join the process group and load all networks.

    Raises:
        UserError: see `destination`, `pick_device` and `EvaluationSettings.networks`.
    """
    path, device = destination(name, settings), pick_device(settings.device)
    with process_group(device):
        networks = settings.networks(device, rgb=rgb)
        origin = {"networks": identities(networks), **provenance(networks[TRAINED], settings)}
        yield EvaluationRun(networks, path, origin)


def identities(networks: Mapping[str, Backbone]) -> dict[str, Any]:
    """Which weights each network has, for a result's JSON."""
    return {
        name: {"sha256": fingerprint(network), "architecture": network.spec}
        for name, network in networks.items()
    }


def provenance(backbone: Backbone, settings: Any) -> dict[str, Any]:
    """Where a result comes from: weights by hash, preprocessing, settings, versions, device."""
    return {
        "weights": {
            "sha256": fingerprint(backbone),
            "architecture": backbone.spec,
            **(backbone.origin or {}),
        },
        "preprocessing": backbone.preprocessing.to_dict(),
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "device": describe(next(backbone.parameters()).device),
        "versions": versions(),
    }


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table of named rows of numbers; `columns` begins with what the names are.

    Names may hold brackets: nothing here is read as rich's markup.
    """
    result = Table(title=title)
    for column in columns:
        result.add_column(column, justify="right" if result.columns else "left")
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def file_name(network: str) -> str:
    """A network's name, which may be a path, without the characters that file names lack."""
    return re.sub(r"[^\w.-]+", "_", network).strip("_")


def print_path(path: Path) -> None:
    """Print where something was written, in one line that can be copied."""
    Console().print(str(path), soft_wrap=True)


def beside(weights: str, name: str) -> Path:
    """Where the result `name` goes: RUN/name.json, FILE.name.json, or ./name.json."""
    path = Path(weights)
    if path.is_dir():
        return path / f"{name}.json"
    return path.with_name(f"{path.name}.{name}.json") if path.is_file() else Path(f"{name}.json")


def destination(name: str, settings: EvaluationSettings) -> Path:
    """The JSON file of the result `name`, which is tried: `settings.out`, or beside the weights.

    Raises:
        UserError: for another ending than .json, or a place that cannot be written.
    """
    path = settings.out or beside(settings.weights, name)
    check_output(path, (".json",))
    return path


def write(
    name: str, content: Mapping[str, Any], backbone: Backbone, settings: EvaluationSettings
) -> Path:
    """Write `content` and where it comes from to `destination`, which is returned."""
    path = destination(name, settings)
    atomic_json(path, {**content, **provenance(backbone, settings)})
    return path
