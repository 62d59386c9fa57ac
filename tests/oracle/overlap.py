"""J and F pixel by pixel, from the words of the DAVIS-2017 evaluation (paper notes 4.7, step 7)."""

from __future__ import annotations

import math

import numpy as np


def jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    pairs = list(zip(found.ravel().tolist(), truth.ravel().tolist(), strict=True))
    union = sum(a or b for a, b in pairs)
    return sum(a and b for a, b in pairs) / union if union else 1.0


def boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            right, below = x + 1 < width, y + 1 < height
            # On the rim only the neighbour along the rim counts.
            neighbours = [(y, x + 1)] if right else []
            neighbours += [(y + 1, x)] if below else []
            neighbours += [(y + 1, x + 1)] if right and below else []
            if any(mask[y, x] != mask[place] for place in neighbours):
                found.add((y, x))
    return found


def boundary_score(found: np.ndarray, truth: np.ndarray) -> float:
    height, width = truth.shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    ours, theirs = boundary(found), boundary(truth)
    if not ours and not theirs:
        return 1.0
    if not ours or not theirs:
        return 0.0

    def share(asked: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in asked]
        return sum(near) / len(near)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
