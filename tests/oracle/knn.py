"""k-NN as the paper tells it (section 3.2, F.1), one query and one neighbour at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
    first = fifth = 0
    for label, votes in _votes(
        bank, bank_labels, queries, query_labels, k, temperature, leave_one_out
    ):
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        first += label in ranking[:1]
        fifth += label in ranking[: min(5, k)]
    return 100 * first / len(queries), 100 * fifth / len(queries)


def top5_bounds(
    bank: np.ndarray,
    bank_labels: Sequence[int],
    queries: np.ndarray,
    query_labels: Sequence[int],
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """Top-5 in percent if classes without any vote are ranked in the worst and the best order."""
    least = most = 0
    for label, votes in _votes(bank, bank_labels, queries, query_labels, k, temperature):
        places = min(5, k)
        voted = [c for c in sorted(votes, key=lambda c: -votes[c]) if votes[c] > 0]
        sure = label in voted[:places]
        others = len(votes) - len(voted)
        certain = label not in voted and others <= places - len(voted)
        least += sure or certain
        most += sure or (label not in voted and len(voted) < places)
    return 100 * least / len(queries), 100 * most / len(queries)


def _votes(
    bank: np.ndarray,
    bank_labels: Sequence[int],
    queries: np.ndarray,
    query_labels: Sequence[int],
    k: int,
    temperature: float,
    leave_one_out: bool = False,
) -> Iterator[tuple[int, dict[int, float]]]:
    """The label of each query, and the votes for every class."""
    classes = sorted({*bank_labels, *query_labels})
    for row, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = [i for i in range(len(bank)) if not (leave_one_out and i == row)]
        similarity = {i: cosine(query, bank[i]) for i in others}
        votes = dict.fromkeys(classes, 0.0)
        for i in sorted(others, key=lambda i: (-similarity[i], i))[:k]:
            votes[bank_labels[i]] += math.exp(similarity[i] / temperature)
        yield label, votes


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of the angle between two vectors."""
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))
