"""What evaluation commands share: settings, networks, one table, one file of JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from rich.table import Table

from dino.evaluate.features.cache import LIBRARIES, default_store, installed
from dino.files import UserError, atomic_json, check_output
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import Precision, describe
from dino.weights.load import fingerprint, load, untrained_like

TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of every command that runs a network on images."""

    renamed: ClassVar[dict[str, str]] = {}
    """Former option -> its name now, both without dashes in front."""

    weights: str
    """Run folder, file of weights or published name."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """Of the network: fp32, or bf16 for speed."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings(NetworkSettings):
    """Settings of every command that extracts features, which are cached on disk."""

    workers: int = 4
    """Processes that read images."""
    store: Path | None = None
    """Folder of cached features, which are reused; by default in the cache (DINO_CACHE)."""

    def extraction(self) -> dict[str, Any]:
        """The keyword arguments of `features.extractor.extract` that these settings give."""
        return {
            "store": self.store or default_store(),
            "workers": self.workers,
            "precision": self.precision,
        }


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

        Args:
            device: where they run.
            rgb: the evaluation reads RGB images only.

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


def identities(networks: Mapping[str, Backbone]) -> dict[str, Any]:
    """Which weights each network has, for a result's JSON."""
    return {
        name: {"sha256": fingerprint(network), "architecture": network.spec}
        for name, network in networks.items()
    }


def provenance(backbone: Backbone, settings: Any) -> dict[str, Any]:
    """Where a result comes from: weights by hash, preprocessing, settings, versions, device.

    Args:
        backbone: the network that was measured.
        settings: the dataclass of the command.
    """
    return {
        "weights": {
            "sha256": fingerprint(backbone),
            "architecture": backbone.spec,
            **(backbone.origin or {}),
        },
        "preprocessing": backbone.preprocessing.to_dict(),
        "settings": {key: _plain(item) for key, item in dataclasses.asdict(settings).items()},
        "device": describe(next(backbone.parameters()).device),
        "versions": {name: installed(name) for name in LIBRARIES},
    }


def _plain(item: Any) -> Any:
    """A setting as JSON takes it: paths as text."""
    if isinstance(item, (tuple, list)):
        return [_plain(one) for one in item]
    return str(item) if isinstance(item, Path) else item


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
    """The name of a network, which may be a path, as a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", network).strip("_")


def print_path(path: Path) -> None:
    """Tell where something was written, in one line that can be copied."""
    Console().print(str(path), soft_wrap=True)


def beside(weights: str, name: str) -> Path:
    """Where the result `name` goes: RUN/name.json, FILE.name.json, or ./name.json."""
    path = Path(weights)
    if path.is_dir():
        return path / f"{name}.json"
    return path.with_name(f"{path.name}.{name}.json") if path.is_file() else Path(f"{name}.json")


@runtime_checkable
class Written(Protocol):
    """Settings that say where a result goes."""

    @property
    def weights(self) -> str:
        """Run folder, file of weights or published name."""
        ...

    @property
    def out(self) -> Path | None:
        """The file; None for one beside the weights."""
        ...


def destination(name: str, settings: Written, siblings: Sequence[str] = ()) -> Path:
    """The JSON file of the result `name`: `settings.out`, or beside the weights.

    Call it before any work: it tries to write there.

    Args:
        name: of the evaluation.
        settings: of the command.
        siblings: endings of further files that are written under the same name, such as ".csv".

    Raises:
        UserError: for another ending than .json, or a place that cannot be written.
    """
    path = settings.out or beside(settings.weights, name)
    check_output(path, (".json",), siblings=siblings)
    return path


def write(name: str, content: Mapping[str, Any], backbone: Backbone, settings: Written) -> Path:
    """Write `content` and where it comes from to `settings.out`, or beside the weights.

    Returns:
        The file.
    """
    path = destination(name, settings)
    atomic_json(path, {**content, **provenance(backbone, settings)})
    return path
