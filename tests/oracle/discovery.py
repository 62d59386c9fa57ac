"""Objects without labels, from the words of the papers: LOST, TokenCut's graph, F, COCO's RLE."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg


# ------------------------------------------------------------------------- LOST, 2109.14279
def lost(features: list[list[float]], width: int, k: int) -> tuple[int, set[int], list[float]]:
    """The seed, the patches of the object, and the sum that decides for each patch.

    `features` are rows, one a patch, of a grid with so many columns.
    """
    n = len(features)

    def product(p: int, q: int) -> float:
        return sum(a * b for a, b in zip(features[p], features[q], strict=True))

    degree = [sum(product(p, q) >= 0 for q in range(n)) for p in range(n)]
    seed = degree.index(min(degree))
    lowest = sorted(range(n), key=lambda p: (degree[p], p))[:k]
    similar = [q for q in lowest if product(q, seed) >= 0]
    sums = [sum(product(q, s) for s in similar) for q in range(n)]
    mask = {q for q in range(n) if sums[q] >= 0}
    return seed, connected(mask, seed, width), sums


def connected(mask: set[int], seed: int, width: int) -> set[int]:
    """The patches of a mask that can be reached from the seed by steps of one row or column."""
    reached, waiting = {seed}, [seed]
    while waiting:
        place = waiting.pop()
        row, column = divmod(place, width)
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            other = y * width + x
            if 0 <= x < width and other in mask and other not in reached:
                reached.add(other)
                waiting.append(other)
    return reached


# --------------------------------------------------------------------- TokenCut, 2202.11539
def cut_vector(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All generalised eigenvalues of (D - W) y = lambda D y, ascending, and their vectors."""
    degrees = np.diag(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degrees - weights, degrees)
    return values, vectors


def graph(features: np.ndarray, threshold: float) -> np.ndarray:
    """Weights of edges between rows."""
    n = len(features)
    weights = np.empty((n, n))
    for p in range(n):
        for q in range(n):
            a, b = features[p], features[q]
            cosine = (a @ b) / np.sqrt((a @ a) * (b @ b))
            weights[p, q] = 1.0 if cosine > threshold else 1e-5
    return weights


# ------------------------------------------------------------------------------ saliency and COCO
def f_at(saliency: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """F of the pixels above a threshold, with beta^2 = .3."""
    right = found = real = 0
    for value, inside in zip(saliency.ravel(), truth.ravel(), strict=True):
        found += bool(value > threshold)
        real += bool(inside)
        right += bool(value > threshold and inside)
    if right == 0:
        return 0.0
    precision, recall = right / found, right / real
    return 1.3 * precision * recall / (0.3 * precision + recall)


def decoded(segmentation: dict[str, Any]) -> np.ndarray:
    """The mask of an uncompressed RLE: runs of 0 and 1 in turn, down the columns."""
    height, width = segmentation["size"]
    mask = np.zeros((height, width), dtype=bool)
    place, value = 0, False
    for count in segmentation["counts"]:
        for _ in range(count):
            mask[place % height, place // height] = value
            place += 1
        value = not value
    assert place == height * width
    return mask
