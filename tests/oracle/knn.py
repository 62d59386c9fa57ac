"""k-NN as the paper tells it (section 3.2, F.1), one query and one neighbour at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def knn(
    bank: np.ndarray,
    bank_labels: Sequence[int],
    queries: np.ndarray,
    query_labels: Sequence[int],
    k: int,
    temperature: float,
    leave_one_out: bool = False,
) -> tuple[float, float]:
    """Top-1 and top-5 in percent; ties go to the earlier image and to the lower label."""
    classes = sorted({*bank_labels, *query_labels})
    first = fifth = 0
    for row, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = [i for i in range(len(bank)) if not (leave_one_out and i == row)]
        similarity = {i: cosine(query, bank[i]) for i in others}
        neighbours = sorted(others, key=lambda i: (-similarity[i], i))[:k]
        votes = dict.fromkeys(classes, 0.0)
        for i in neighbours:
            votes[bank_labels[i]] += math.exp(similarity[i] / temperature)
        ranking = sorted(classes, key=lambda c: (-votes[c], c))
        first += label in ranking[:1]
        fifth += label in ranking[: min(5, k)]
    return 100 * first / len(queries), 100 * fifth / len(queries)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))
