"""How well objects that were found without labels agree with masks.

CorLoc as LOST (arXiv 2109.14279) has it, IoU and the largest F as TokenCut (arXiv 2202.11539): F at
255 thresholds, averaged over images, then the largest.

Shapes: H W pixels, t thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dino.data.images.masks import VOID, Ids, objects_in
from dino.evaluate.segmentation.discovered import Box, Discovered, box_of

BETA2 = 0.3
"""Squared weight of recall against precision in F, as all work on saliency has it."""

THRESHOLDS = np.arange(255) / 255
"""Of the saliency, for the largest F."""


MEASURES = {"corloc": "CorLoc", "iou": "IoU", "max_f": "max F"}
"""Of `summary`, with their names."""


class Agreement(NamedTuple):
    """Of one image.

    Attributes:
        localized: whether the box has an IoU above .5 with that of an object (CorLoc).
        iou: intersection over union of the mask and all objects, from 0 to 1.
        f: F at each threshold, from 0 to 1.
    """

    localized: bool
    iou: float
    f: Float[np.ndarray, " t"]


def agreement(found: Discovered, ids: Ids) -> Agreement:
    """The agreement with a mask that holds an object; void pixels count for nothing."""
    valid, objects = ids != VOID, [ids == number for number in objects_in(ids)]
    truth = np.logical_or.reduce(objects)[valid]
    mask = found.pixels(*ids.shape)[valid]
    box = found.box(*ids.shape)
    return Agreement(
        any(box_iou(box, box_of(one)) > 0.5 for one in objects),
        np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth),
        f_scores(found.soft(*ids.shape)[valid], truth),
    )


def summary(agreements: Sequence[Agreement]) -> dict[str, float]:
    """In percent: CorLoc, the mean IoU, and the largest over thresholds of the mean F."""
    localized, ious, scores = zip(*agreements, strict=True)
    shares = {"corloc": np.mean(localized), "iou": np.mean(ious)}
    shares["max_f"] = np.mean(scores, axis=0).max()
    return {name: 100 * float(share) for name, share in shares.items()}


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    both = 1
    for axis in (0, 1):
        ends = (box[axis] + box[axis + 2] for box in (one, other))
        both *= max(0, min(ends) - max(one[axis], other[axis]))
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def f_scores(
    saliency: Float[np.ndarray, " pixels"], truth: Bool[np.ndarray, " pixels"]
) -> Float[np.ndarray, " t"]:
    """F of the pixels whose saliency exceeds each threshold: (1 + b) P R / (b P + R), b = .3.

    P and R are precision and recall. F is 0 where no pixel is right.

    Args:
        saliency: of pixels, from 0 to 1.
        truth: whether each belongs to an object; some do.
    """
    passed = np.searchsorted(THRESHOLDS, saliency)  # how many thresholds lie below
    counts = np.stack([np.bincount(passed[of], minlength=256) for of in (truth, ~truth)])
    right, wrong = counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    # With right pixels r and wrong ones w, of a truth of g: F = (1 + b) r / (b g + r + w).
    return (1 + BETA2) * right / np.maximum(BETA2 * truth.sum() + right + wrong, 1e-12)
