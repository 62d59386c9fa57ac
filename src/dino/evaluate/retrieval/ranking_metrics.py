"""Mean average precision of rankings, the measure of retrieval and copy detection.

Shapes: q queries, n images of the database, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.features.search import directions

KAPPAS = (1, 5, 10)
"""The k of mP@k."""


def average_precision(ranks: Sequence[int], positives: int) -> float:
    """The area below precision over recall, by trapezoids (Philbin et al. 2007).

    The j-th positive found, at rank r, adds the mean of the precision just before it, j / r (1 at
    rank 0), and with it, (j + 1) / (r + 1). Positives that were not found add nothing.

    Args:
        ranks: of the positives that were found, from 0, ascending.
        positives: how many there are, at least one.

    Returns:
        0 to 1.
    """
    total = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / positives


def precision_at(ranks: Sequence[int], k: int) -> float:
    """Share of positives among the first k, or up to the last positive where that comes earlier.

    Args:
        ranks: of all positives, from 0, ascending, at least one.
        k: at least 1.
    """
    depth = min(ranks[-1] + 1, k)
    return sum(rank < depth for rank in ranks) / depth


def positions(
    ranking: Int[np.ndarray, " n"], positives: Collection[int], junk: Collection[int]
) -> list[int]:
    """Ranks of the positives, from 0, ascending, in a ranking from which the junk is removed.

    Args:
        ranking: images of the database, best first.
        positives: images that should come first.
        junk: images that are left out.
    """
    found, left_out = (np.flatnonzero(np.isin(ranking, list(kind))) for kind in (positives, junk))
    ranks: list[int] = (found - np.searchsorted(left_out, found)).tolist()
    return ranks


def summarize(ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Means over the queries in percent; those without positives do not count.

    Args:
        ranks: of all positives of each query, from 0, ascending.

    Returns:
        "map", the mean average precision; "mp", the mean precision among the first k, by k;
        "queries", how many count; "ap" of each query, None for those without positives. Means of no
        query are NaN.
    """
    counted = [found for found in ranks if found]
    aps = [100 * average_precision(found, len(found)) if found else None for found in ranks]
    precisions = {str(k): [100 * precision_at(found, k) for found in counted] for k in KAPPAS}
    return {
        "map": _mean([ap for ap in aps if ap is not None]),
        "mp": {k: _mean(values) for k, values in precisions.items()},
        "queries": len(counted),
        "ap": aps,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@torch.inference_mode()
def rankings(
    queries: Float[Tensor, "q D"],
    database: Float[Tensor, "n D"],
    *,
    limit: int = 2**25,
    tile: int = 2**16,
    device: torch.device | str | None = None,
) -> Iterator[Int[np.ndarray, " n"]]:
    """For each query all images of the database by cosine similarity, best first.

    Among equal similarities the lower index wins.

    Args:
        queries: features; float64 is computed in float64, all else in float32.
        database: features; moved to `device` tile by tile.
        limit: similarities that exist at once, about; at least those of one query.
        tile: database images at a time.
        device: where to compute; by default where `queries` are.
    """
    device = torch.device(device) if device is not None else queries.device
    for chunk in torch.split(queries, max(1, limit // max(1, len(database)))):
        rows = directions(chunk, device)
        scores = [rows @ directions(block, device).T for block in torch.split(database, tile)]
        for similarity in torch.cat(scores, dim=1):
            yield similarity.argsort(descending=True, stable=True).cpu().numpy()
