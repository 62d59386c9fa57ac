"""What evaluation commands share: their settings, the networks, one table, one file of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table

from dino.evaluate.features.cache import kept_features
from dino.evaluate.features.export import provenance
from dino.files import UserError, atomic_json, check_output
from dino.models.backbone import Backbone
from dino.runtime import Precision
from dino.weights.load import load, untrained_like

TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Settings of every command that measures a network by features that are kept on disk."""

    weights: str
    """Run folder, file of weights or published name."""
    baseline: bool = False
    """Also measure the same network untrained."""
    workers: int = 4
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """fp32, or bf16 for speed."""
    store: Path | None = None
    """Where features are kept, to be found again; by default in the cache (DINO_CACHE)."""
    out: Path | None = None
    """Where the result goes as JSON; by default beside the weights."""

    def extraction(self) -> dict[str, Any]:
        """The keyword arguments of `features.cache.described` that follow from these."""
        return {
            "store": self.store or kept_features(),
            "workers": self.workers,
            "precision": self.precision,
        }


def load_rgb(weights: str, device: torch.device) -> Backbone:
    """The network of an evaluation that reads pictures as RGB.

    Raises:
        UserError: for weights that are not there, or that take other channels.
    """
    backbone = load(weights, device)
    channels = len(backbone.preprocessing.mean)
    if channels != 3:
        raise UserError(
            f"this evaluation reads RGB pictures, and {weights} takes {channels} channels: "
            "measure it with knn, linear or logistic"
        )
    return backbone


def networks(backbone: Backbone, settings: Measured) -> dict[str, Backbone]:
    """The network to be measured as "trained" and, if asked for, its twin as "untrained"."""
    named = {TRAINED: backbone}
    if settings.baseline:
        named[UNTRAINED] = untrained_like(backbone)
    return named


def beside(weights: str, name: str) -> Path:
    """Where the result `name` goes: RUN/name.json, FILE.name.json, or ./name.json."""
    path = Path(weights)
    if path.is_dir():
        return path / f"{name}.json"
    return path.with_name(f"{path.name}.{name}.json") if path.is_file() else Path(f"{name}.json")


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table of named rows of numbers; `columns` begins with what the names are."""
    result = Table(title=title)
    first, *others = columns
    result.add_column(first)
    for column in others:
        result.add_column(column, justify="right")
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


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
