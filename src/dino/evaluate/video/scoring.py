"""Masks of a video as files, and the scores of its objects; finished videos are not repeated.

A sequence's masks are FOLDER/NAME/00000.png, ..., the format of the benchmark. FOLDER/NAME.json is
written last, with the scores and a hash of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dino.evaluate.masks import Mask, read_mask, write_mask
from dino.evaluate.video.davis import Clip
from dino.evaluate.video.davis_metrics import Statistics, boundary_score, jaccard, statistics
from dino.evaluate.video.tracking import Tracking, track
from dino.files import UserError, atomic_json, read_json
from dino.models.backbone import Backbone

Scores = dict[str, dict[str, dict[str, float]]]
"""By object and by measure, J or F: mean, recall and decay in percent."""

MEASURES = {"J": jaccard, "F": boundary_score}


def measure(
    backbone: Backbone,
    weights: str,
    clip: Clip,
    folder: Path,
    how: Tracking,
    advance: Callable[[int], object],
) -> Scores:
    """Track the objects of a video and score them, unless that is finished.

    Args:
        backbone: the network.
        weights: its fingerprint.
        clip: the video.
        folder: of its masks and their scores.
        how: the settings that decide the masks.
        advance: called with the number of frames that are done.

    Returns:
        The scores; none if the video has no masks to compare with.
    """
    record, key = folder / f"{clip.name}.json", _key(weights, clip, how)
    paths = [folder / clip.name / f"{frame.stem}.png" for frame in clip.frames]
    finished = _finished(record, key)
    if finished is not None and all(path.is_file() for path in paths):
        advance(len(paths))
        return finished
    record.unlink(missing_ok=True)  # it belongs to the masks that are replaced now
    series: dict[str, dict[str, list[float]]] = {}
    first = None
    for index, (path, mask) in enumerate(zip(paths, track(backbone, clip, how), strict=True)):
        write_mask(mask, path)
        first = first or mask
        if clip.scored and 0 < index < len(paths) - 1:
            truth = read_mask(clip.masks[index], first)
            for number in first.objects:
                per_measure = series.setdefault(str(number), {name: [] for name in MEASURES})
                for name, score in score_object(mask, truth, number).items():
                    per_measure[name].append(score)
        advance(1)
    scores = {
        number: {name: _percent(statistics(values)) for name, values in per_measure.items()}
        for number, per_measure in series.items()
    }
    atomic_json(record, {"key": key, "scores": scores})
    return scores


def score_object(found: Mask, truth: Mask, number: int) -> dict[str, float]:
    """J and F of one object in one frame. Void of the truth is background, as officially."""
    regions = found.ids == number, truth.ids == number
    return {name: score(*regions) for name, score in MEASURES.items()}


def summary(sequences: Mapping[str, Scores]) -> dict[str, Any]:
    """Means over all objects of all sequences, not over sequences: as in the paper's Table 5.

    Returns:
        J and F with mean, recall and decay, and J&F, the mean of the means of both; empty without
        any object that was scored.
    """
    objects = [scores for per_object in sequences.values() for scores in per_object.values()]
    if not objects:
        return {}
    means = {
        name: {field: float(np.mean([one[name][field] for one in objects])) for field in fields}
        for name, fields in objects[0].items()
    }
    both = float(np.mean([means[name]["mean"] for name in MEASURES]))
    return {"J&F": both, **means}


def _percent(found: Statistics) -> dict[str, float]:
    return {name: 100 * value for name, value in found._asdict().items()}


def _key(weights: str, clip: Clip, how: Tracking) -> str:
    parts = {"weights": weights, "files": clip.fingerprint(), "settings": asdict(how), "version": 1}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(record: Path, key: str) -> Scores | None:
    try:
        content = read_json(record)
    except UserError:  # missing or no JSON
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    return content["scores"]
