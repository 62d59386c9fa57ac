"""Agreement of masks: regions (J) and boundaries (F) as defined by the DAVIS-2017 evaluation.

Shapes: H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

Region = Bool[np.ndarray, "H W"]


STATISTICS = ("mean", "recall", "decay")


def jaccard(found: Region, truth: Region) -> float:
    """J: intersection over union; 1 if both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary_score(found: Region, truth: Region) -> float:
    """F: harmonic mean of precision and recall of the boundary.

    A boundary pixel is right if a boundary pixel of the other mask lies at most as far away as
    0.008 of the image's diagonal, rounded up. Without any boundary in both masks F is 1; without
    one in one of them 0.
    """
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    ours, theirs = boundary(found), boundary(truth)
    counts = np.count_nonzero(ours), np.count_nonzero(theirs)
    if not all(counts):
        return float(not any(counts))
    rows, columns = (np.flatnonzero((ours | theirs).any(axis=axis)) for axis in (1, 0))
    extent = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    ours, theirs = ours[extent], theirs[extent]
    precision = np.count_nonzero(ours & dilated(theirs, radius)) / counts[0]
    recall = np.count_nonzero(theirs & dilated(ours, radius)) / counts[1]
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def boundary(mask: Region) -> Region:
    """Pixels that differ from their right, lower or lower right neighbour.

    The lowest row is compared to the right only, the rightmost column downwards only, the corner
    with nothing.
    """
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def dilated(mask: Region, radius: int) -> Region:
    """Pixels with one of the mask at most `radius` away: rows of a disk, by running sums."""
    height, width = mask.shape
    padded = np.pad(mask, ((radius, radius), (radius + 1, radius)))
    running = padded.cumsum(axis=1, dtype=np.int32)
    result = np.zeros_like(mask)
    for offset in range(radius + 1):
        half = math.isqrt(radius**2 - offset**2)
        right = running[:, radius + half + 1 :][:, :width]
        reached = right != running[:, radius - half :][:, :width]
        result |= reached[radius + offset :][:height]
        result |= reached[radius - offset :][:height]
    return result


def statistics(scores: Sequence[float]) -> dict[str, float]:
    """The benchmark's statistics of an object's J or F over at least one frame, in percent.

    The quarters overlap in their first and last frames, as officially. (Officially their ends
    wrap around after 256 frames, which no video of DAVIS has; here they do not.)

    Returns:
        The "mean" over the frames, "recall", the share of the frames above one half, and "decay",
        the mean of the first quarter less that of the last.
    """
    values = np.asarray(scores, dtype=np.float64)
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = (values[ends[i] : ends[i + 1] + 1].mean() for i in (0, 3))
    found = (values.mean(), (values > 0.5).mean(), first - last)
    return {name: 100 * float(one) for name, one in zip(STATISTICS, found, strict=True)}
