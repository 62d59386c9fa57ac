"""Jaccard of masks and mean IoU of classes, pixel by pixel, from the words of the paper notes."""

from __future__ import annotations

import numpy as np

VOID = 255


def enlarged(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbours."""
    h, w = mask.shape
    return np.array(
        [[mask[y * h // height, x * w // width] for x in range(width)] for y in range(height)]
    )


def best_heads(masks: list[np.ndarray], ids: np.ndarray) -> tuple[float, float]:
    """Best head for each object, and best head for the picture: mean over its objects."""
    height, width = ids.shape
    large = [enlarged(mask, height, width) for mask in masks]
    objects = sorted({*ids.ravel().tolist()} - {0, VOID})
    table = []
    for number in objects:
        row = []
        for mask in large:
            both = union = 0
            for y in range(height):
                for x in range(width):
                    if ids[y, x] == VOID:
                        continue
                    mine, theirs = bool(mask[y, x]), ids[y, x] == number
                    both += mine and theirs
                    union += mine or theirs
            row.append(both / union)
        table.append(row)
    per_object = sum(max(row) for row in table) / len(table)
    per_image = max(sum(column) / len(table) for column in zip(*table, strict=True))
    return per_object, per_image


def mean_iou(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Mean over all classes seen of sum of intersections over sum of unions."""
    pairs = [
        (int(a), int(b))
        for one, other in zip(found, truth, strict=True)
        for a, b in zip(one.ravel(), other.ravel(), strict=True)
        if b != VOID
    ]
    classes = {number for pair in pairs for number in pair}
    shares = []
    for number in classes:
        both = sum(a == b == number for a, b in pairs)
        either = sum(number in (a, b) for a, b in pairs)
        shares.append(both / either)
    return sum(shares) / len(shares)
