"""What evaluation commands share: networks side by side, and one file of JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from dino.data.images.pixel_format import PixelFormat
from dino.evaluate import results
from dino.evaluate.shared_images import shared_images
from dino.features.command import (
    TRAINED,
    UNTRAINED,
    ComparisonSettings,
    ExtractionSettings,
    identities,
    print_path,
    provenance,
)
from dino.files import atomic_json, check_output
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group, ranks

__all__ = ["TRAINED", "UNTRAINED", "ComparisonSettings"]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ComparisonSettings):
    """Settings of every evaluation."""

    out: Path | None = None
    """The result as JSON; by default RUN/results/NAME-DATA.json, or beside a file of weights."""


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluationSettings(EvaluationSettings, ExtractionSettings):
    """Settings of every evaluation of extracted features."""


Scores = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""By measure and network: "percent" and, where it is known, its "standard_error"."""


@dataclass(frozen=True)
class EvaluationRun:
    """A running evaluation command.

    Attributes:
        networks: by name, on the device.
        path: the JSON file of the result.
        origin: where the result comes from, as JSON takes it.
        notes: sentences to print below the table.
    """

    networks: dict[str, Backbone]
    path: Path
    origin: dict[str, Any]
    notes: list[str]

    @property
    def pixels(self) -> PixelFormat:
        """The pixels that all networks take."""
        return self.networks[TRAINED].preprocessing.pixels

    def compare_images(self, training: Sequence[str], test: Sequence[str] | None) -> None:
        """Report test images that are also training images, by their paths; see `shared_images`.

        Only the main process compares, and only files.
        """
        if ranks().main:
            found = shared_images(training, test)
            self.origin["shared_images"] = found and dataclasses.asdict(found)
            if found and found.count:
                self.notes.append(found.sentence())

    def report(
        self,
        content: Mapping[str, Any],
        *printed: Table | str,
        images: int,
        scores: Scores | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """Write the result, then print tables and sentences (main process only).

        Args:
            content: the result as JSON takes it; its origin is added.
            printed: tables and sentences.
            images: how many the scores are of.
            scores: the principal numbers of the result, for the page of the run.
            files: written beside the result, whose paths are printed too.
        """
        if not ranks().main:
            return
        written = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"measured_images": images, "scores": scores or {}, "written": written}
        atomic_json(self.path, {**content, **about, **self.origin})
        for item in printed:
            Console().print(item)
        weights = (weights_line(name, of.origin) for name, of in self.networks.items() if of.origin)
        for sentence in (*self.notes, *weights):
            Console().print(sentence, soft_wrap=True)
        for path in (self.path, *files):
            print_path(path)


@contextmanager
def evaluation_run(
    name: str, settings: ComparisonSettings, *data: str | Path | None, rgb: bool = False
) -> Iterator[EvaluationRun]:
    """Check where the result `name` goes, join the process group and load all networks.

    Args:
        name: of the evaluation.
        settings: of the command.
        data: all images that it measures on, by which the result is named; None is left out.
        rgb: whether it reads RGB images only.

    Raises:
        UserError: see `destination`, `pick_device` and `ComparisonSettings.networks`.
    """
    used = [one for one in data if one is not None]
    sources = [results.located(one) for one in used]
    label = "-".join(dict.fromkeys(map(results.data_name, sources)))
    path, device = destination(f"{name}-{label}", settings, sources), pick_device(settings.device)
    with process_group(device):
        networks = settings.networks(device, rgb=rgb)
        origin = {
            "evaluation": name,
            "data": label,
            "sources": sources,
            "networks": identities(networks),
            **provenance(networks[TRAINED], settings),
        }
        yield EvaluationRun(networks, path, origin, [])


def weights_line(name: str, origin: Mapping[str, Any]) -> str:
    """Such as "trained: teacher.safetensors, recipe small_data, step 8 of 500"."""
    facts = [origin["file"]]
    if "recipe" in origin:
        facts.append(f"recipe {origin['recipe']}")
    if {"step", "steps"} <= origin.keys():
        facts.append(f"step {origin['step']} of {origin['steps']}")
    return f"{name}: {', '.join(facts)}"


def destination(name: str, settings: ComparisonSettings, sources: Sequence[str]) -> Path:
    """The JSON file of the result `name` of the images `sources`, which is tried.

    It is the `out` of `EvaluationSettings`, or lies in the run folder or beside the weights
    (`evaluate.results`).

    Raises:
        UserError: for another ending than .json, or a place that cannot be written.
    """
    default = results.numbered(results.default_path(settings.weights, name), sources)
    path = (isinstance(settings, EvaluationSettings) and settings.out) or default
    check_output(path, (".json",))
    return path
