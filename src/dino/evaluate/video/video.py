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

from dino.evaluate import command
from dino.evaluate.results import file_name
from dino.evaluate.video.davis import Clip, open_davis
from dino.evaluate.video.davis_metrics import STATISTICS
from dino.evaluate.video.overlay import write_overlay
from dino.evaluate.video.scoring import MEASURES, Scores, measure, summary
from dino.evaluate.video.tracking import Tracking
from dino.features.command import number_table
from dino.features.table import my_share
from dino.files import atomic_csv, check_outside
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import gather_objects, ranks
from dino.settings import validated
from dino.weights.load import fingerprint


@dataclass(frozen=True, kw_only=True)
class Video(Tracking, command.EvaluationSettings):
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
    overlay: Literal["none", "gif"] = "none"
    """Also write each video with its masks as an animation."""
    masks: Path | None = None
    """Folder for masks and animations; by default beside the result. Finished sequences in it are
    not computed again."""


def run(settings: Video) -> dict[str, Any]:
    """`dino evaluate video`: masks, one table, a CSV of all objects, and JSON with its provenance.

    Returns:
        The JSON's "video": by network the means over all objects, in percent, and under "sequences"
        the scores of each.

    Raises:
        UserError: for weights, videos or masks that are missing or inconsistent.
    """
    settings = validated(settings)
    check_outside(settings.out, settings.data)
    check_outside(settings.masks, settings.data, "--masks")
    with command.evaluation_run("video", settings, settings.data, rgb=True) as started:
        clips = open_davis(
            settings.data, settings.split, settings.year, settings.resolution, settings.sequences
        )
        folder = settings.masks or started.path.with_suffix("")
        content: dict[str, dict[str, Any]] = {}
        for name, network in started.networks.items():
            found = _of_network(clips, name, network, folder / file_name(name), settings)
            content[name] = {**summary(found), "sequences": found}
        listing = started.path.with_suffix(".csv")
        if ranks().main:
            header = ["network", "sequence", "object", *(f"{m} {s}" for m, s in COLUMNS)]
            atomic_csv(listing, header, _lines(content))
        frames = sum(len(clip.frames) for clip in clips)
        started.report(
            {"video": content, "images": {"sequences": len(clips), "frames": frames}},
            _table(content, frames, settings),
            images=frames,
            scores={"J&F": {name: {"percent": of.get("J&F")} for name, of in content.items()}},
            files=[listing, folder],
        )
    return content


def _of_network(
    clips: Sequence[Clip], name: str, network: Backbone, folder: Path, settings: Video
) -> dict[str, Scores]:
    """The scores of all sequences, divided among the ranks."""
    mine = [clips[index] for index in my_share(range(len(clips)))]
    weights, frames = fingerprint(network), sum(len(clip.frames) for clip in mine)
    found: dict[str, Scores] = {}
    with bar(f"{name}, frames", frames, shown=ranks().main) as advance:
        for clip in mine:
            found[clip.name] = measure(network, weights, clip, folder, settings, advance)
            if settings.overlay == "gif":
                write_overlay(clip, folder / clip.name, folder / f"{clip.name}.gif")
    return {clip: scores for share in gather_objects(found) for clip, scores in share.items()}


COLUMNS = [(measure, statistic) for measure in MEASURES for statistic in STATISTICS]
"""Of the CSV: one line for each object, in percent."""


def _lines(content: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for network, results in content.items():
        for sequence, scores in results["sequences"].items():
            for number, of in scores.items():
                values = (f"{of[measure][statistic]:.4f}" for measure, statistic in COLUMNS)
                yield (network, sequence, number, *values)


def _table(content: Mapping[str, Mapping[str, Any]], frames: int, settings: Video) -> Table:
    """J&F of each sequence, and all three measures over all objects, for every network."""
    rows: dict[str, list[str]] = {}
    found = [one["sequences"] for one in content.values()]
    for sequence, scores in found[0].items():
        values = [summary({sequence: of[sequence]}) for of in found]
        rows[sequence] = [f"{len(scores)}", *(_cell(one.get("J&F")) for one in values)]
    objects = sum(map(len, found[0].values()))
    rows["all objects"] = [f"{objects}", *(_cell(one.get("J&F")) for one in content.values())]
    for name in MEASURES:
        means = [one.get(name, {}).get("mean") for one in content.values()]
        rows[f"  {name} alone"] = ["", *map(_cell, means)]
    how = f"{settings.last_frames} last frames, radius {settings.radius}"
    count = len(found[0])
    what = f"{count} sequence{'s' * (count != 1)}, {frames} frames"
    title = f"video object segmentation, J&F in %\n{what}, {settings.size} px, {how}"
    return number_table(title, ["sequence", "objects", *content], rows)


def _cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"
