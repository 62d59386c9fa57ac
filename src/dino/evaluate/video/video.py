"""Video object segmentation by label propagation (section 4.2.2, Table 5), on DAVIS-2017 or alike.

The masks are written in the format of DAVIS, and scored by its definitions: region similarity J and
contour accuracy F of each object in each frame but the first and the last, then means over frames,
and over the objects of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from dino.evaluate.command import (
    TRAINED,
    EvaluationSettings,
    destination,
    file_name,
    identities,
    print_path,
    table,
    write,
)
from dino.evaluate.features.table import my_share
from dino.evaluate.video.davis import Clip, open_davis
from dino.evaluate.video.davis_metrics import Statistics
from dino.evaluate.video.overlay import write_overlay
from dino.evaluate.video.propagation import Neighbourhood
from dino.evaluate.video.scoring import MEASURES, Scores, measure, summary
from dino.evaluate.video.tracking import Normalization, Tracking
from dino.files import atomic_csv
from dino.models.backbone import Backbone
from dino.progress import Console, bar
from dino.runtime import gather_objects, pick_device, process_group, ranks
from dino.weights.load import fingerprint


@dataclass(frozen=True, kw_only=True)
class Video(EvaluationSettings):
    """Track objects through videos from their first mask (paper section 4.2.2, Table 5)."""

    data: Path
    """The folder of DAVIS, with JPEGImages, Annotations and ImageSets."""
    split: str = "val"
    """Which list of sequences, by the name of its file."""
    year: str = "2017"
    """Folder of the list."""
    resolution: str = "480p"
    """Folder of the frames and masks."""
    sequences: tuple[str, ...] = ()
    """Only these sequences; the list is not needed then."""
    size: int = 480
    """Shorter side of the network's input in pixels."""
    last_frames: int = 7
    """How many frames before a frame give it labels, beside the first."""
    radius: int | None = 12
    """How many patches away the sources of a patch may lie; None for anywhere."""
    neighbours: int = 5
    """How many patches give their labels to one."""
    temperature: float = 0.1
    """A source weighs exp(cosine similarity / temperature)."""
    normalization: Normalization = "reference"
    """reference: normalise frames as the published script, which has .228 instead of .229 as
    ImageNet's first standard deviation. weights: as the weights require."""
    overlay: Literal["none", "gif"] = "none"
    """Also write each video with its masks as an animation."""
    masks: Path | None = None
    """Folder for masks and animations; by default beside the result. Finished sequences in it are
    not computed again."""

    def tracking(self) -> Tracking:
        """The settings that decide the masks.

        Raises:
            UserError: for impossible ones.
        """
        return Tracking(
            size=self.size,
            last=self.last_frames,
            how=Neighbourhood(
                radius=self.radius, neighbours=self.neighbours, temperature=self.temperature
            ),
            normalization=self.normalization,
            precision=self.precision,
        )


def run(settings: Video) -> dict[str, Any]:
    """`dino evaluate video`: masks, one table, a CSV of all objects, and JSON with its provenance.

    Returns:
        The JSON's "video": by network the means over all objects, in percent, and under "sequences"
        the scores of each.

    Raises:
        UserError: for weights, videos or masks that do not exist or do not fit.
    """
    path = destination("video", settings)
    clips = open_davis(
        settings.data, settings.split, settings.year, settings.resolution, settings.sequences
    )
    tracking = settings.tracking()
    folder = settings.masks or path.with_suffix("")
    device = pick_device(settings.device)
    with process_group(device) as here:
        networks = settings.networks(device, rgb=True)
        found = {
            name: _of_network(clips, name, network, folder / file_name(name), tracking, settings)
            for name, network in networks.items()
        }
        content = {name: {**summary(of), "sequences": of} for name, of in found.items()}
        if here.main:
            about = {"data": str(settings.data), "networks": identities(networks)}
            write("video", {"video": content, **about}, networks[TRAINED], settings)
            atomic_csv(path.with_suffix(".csv"), COLUMNS, _lines(found))
            Console().print(_table(found, content, settings))
            print_path(folder)
    return content


def _of_network(
    clips: Sequence[Clip],
    name: str,
    network: Backbone,
    folder: Path,
    tracking: Tracking,
    settings: Video,
) -> dict[str, Scores]:
    """The scores of all sequences, divided among the ranks."""
    mine = [clips[index] for index in my_share(range(len(clips)))]
    weights, frames = fingerprint(network), sum(len(clip.frames) for clip in mine)
    found: dict[str, Scores] = {}
    with bar(f"{name}, frames", frames, shown=ranks().main) as advance:
        for clip in mine:
            found[clip.name] = measure(network, weights, clip, folder, tracking, advance)
            if settings.overlay == "gif":
                write_overlay(clip, folder / clip.name, folder / f"{clip.name}.gif")
    return {clip: scores for part in gather_objects(found) for clip, scores in part.items()}


COLUMNS = (
    *("network", "sequence", "object"),
    *(f"{measure} {field}" for measure in MEASURES for field in Statistics._fields),
)
"""Of the CSV: one line for each object, in percent."""


def _lines(found: Mapping[str, Mapping[str, Scores]]) -> Iterator[tuple[Any, ...]]:
    for network, sequences in found.items():
        for sequence, scores in sequences.items():
            for number, measures in scores.items():
                values = (measures[one][field] for one in MEASURES for field in Statistics._fields)
                yield (network, sequence, number, *(f"{value:.4f}" for value in values))


def _table(
    found: Mapping[str, Mapping[str, Scores]], content: Mapping[str, Any], settings: Video
) -> Table:
    """J&F of each sequence, and all three measures over all objects, for every network."""
    rows: dict[str, list[str]] = {}
    for sequence, scores in found[TRAINED].items():
        values = [summary({sequence: of[sequence]}) for of in found.values()]
        rows[sequence] = [f"{len(scores)}", *(_cell(one.get("J&F")) for one in values)]
    objects = sum(len(scores) for scores in found[TRAINED].values())
    rows["all objects"] = [f"{objects}", *(_cell(one.get("J&F")) for one in content.values())]
    for name in MEASURES:
        means = [one.get(name, {}).get("mean") for one in content.values()]
        rows[f"  {name} alone"] = ["", *map(_cell, means)]
    how = f"{settings.last_frames} last frames, radius {settings.radius}"
    title = f"video object segmentation, J&F in %\n{settings.size} px, {how}"
    return table(title, ["sequence", "objects", *found], rows)


def _cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"
