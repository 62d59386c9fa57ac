"""Masks of a video as files, and the scores of its objects; finished videos are not repeated.

A sequence's masks are FOLDER/NAME/00000.png, ..., the format of the benchmark. FOLDER/NAME.json is
written last, with the scores and a hash of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.images.masks import read_mask, write_mask
from dino.evaluate.video.davis import Clip
from dino.evaluate.video.davis_metrics import boundary_score, jaccard, statistics
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
        backbone: the network, in evaluation mode.
        weights: its fingerprint.
        clip: the video.
        folder: of the masks and their scores.
        how: everything else that the masks depend on.
        advance: called with the number of finished frames.

    Returns:
        The scores; none if the video has no masks to compare with.
    """
    settings = {field.name: getattr(how, field.name) for field in fields(Tracking)}
    content = {"weights": weights, "files": clip.fingerprint(), "settings": settings}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    record = folder / f"{clip.name}.json"
    paths = [folder / clip.name / f"{frame.stem}.png" for frame in clip.frames]
    with suppress(UserError):  # missing or no JSON
        finished = read_json(record)
        same = isinstance(finished, dict) and finished.get("key") == key
        if same and all(path.is_file() for path in paths):
            advance(len(paths))
            return finished["scores"]
    record.unlink(missing_ok=True)  # it belongs to the masks that are replaced now
    series: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    first = None
    for index, (path, mask) in enumerate(zip(paths, track(backbone, clip, how), strict=True)):
        write_mask(mask, path)
        first = first or mask
        if clip.scored and 0 < index < len(paths) - 1:
            truth = read_mask(clip.masks[index], first)
            for number in first.objects:  # void of the truth is background, as officially
                for name, score in MEASURES.items():
                    value = score(mask.ids == number, truth.ids == number)
                    series[str(number)][name].append(value)
        advance(1)
    scores = {
        number: {name: statistics(values) for name, values in per_measure.items()}
        for number, per_measure in series.items()
    }
    atomic_json(record, {"key": key, "scores": scores})
    return scores


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
