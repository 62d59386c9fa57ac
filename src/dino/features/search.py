"""Exact search for the most similar features, in bounded memory.

Similarities exist tile by tile only, so memory does not grow with the bank, and the k best are
exact: equal similarities keep the order of the bank, whatever the tiles.

Shapes: n images of the bank, q queries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 32
"""Columns whose largest similarity is compared first; with fewer the pass fills no vectors."""


@torch.inference_mode()
def nearest(
    queries: Float[Tensor, "q D"],
    bank: Float[Tensor, "n D"],
    k: int,
    *,
    skip: int | None = None,
    unit: bool = False,
    chunk: int = 512,
    tile: int = 2**16,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k bank images of highest cosine similarity, best first, and the similarities.

    Among equal similarities the lower index wins. k is at most n, or n - 1 with `skip`: query i may
    not find image `skip + i` of the bank, which is the same image. With `unit` the bank has rows of
    length 1 and the type of the queries, which are then not copied. All queries are moved to
    `device` (by default it is theirs), the bank tile by tile. At most chunk x tile similarities, of
    `chunk` queries and `tile` images, exist at once.
    """
    device = torch.device(device) if device is not None else queries.device
    queries = directions(queries, device)
    similarity = queries.new_full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    buffer = queries.new_empty(min(chunk, len(queries)) * min(tile, len(bank)))
    for first in range(0, len(bank), tile):
        block = bank[first : first + tile]
        block = block.to(device) if unit else directions(block, device)
        for start in range(0, len(queries), chunk):
            rows = slice(start, min(start + chunk, len(queries)))
            size = (rows.stop - start, len(block))
            scores = torch.mm(queries[rows], block.T, out=buffer[: size[0] * size[1]].view(size))
            if skip is not None:
                # Query start + i is image skip + start + i: a diagonal, if it crosses this tile.
                scores.diagonal(skip + start - first).fill_(-torch.inf)
            found, where = _top(scores, min(k, size[1]))
            # Earlier tiles stand first and the sort is stable: equal values keep bank order.
            merged, order = torch.cat([similarity[rows], found], dim=1).sort(
                dim=1, descending=True, stable=True
            )
            both = torch.cat([index[rows], where + first], dim=1)
            similarity[rows], index[rows] = merged[:, :k], both.gather(1, order[:, :k])
    return similarity, index


def directions(features: Float[Tensor, "n D"], device: torch.device) -> Float[Tensor, "n D"]:
    """Features of length 1 on `device`; float64 stays float64, all else becomes float32."""
    features = features.to(device)
    if features.dtype != torch.float64:
        features = features.float()
    return F.normalize(features, dim=1)


def _top(scores: Float[Tensor, "q n"], k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)`, but equal scores in the order of their index, also across the edge.

    One fast pass finds the largest score of each group of columns. The k-th largest of these is a
    level that at least k scores reach, all of them in groups that reach it; as a rule hardly more
    than k. Only these are sorted.
    """
    count = scores.shape[1] // GROUP
    if count < 2 * k:  # the level would exclude little
        return _top_directly(scores, k)
    grouped = scores[:, : count * GROUP].unflatten(1, (count, GROUP))
    levels, groups = grouped.amax(dim=2).topk(k + 1, dim=1)
    groups = groups[:, :k].sort(dim=1).values  # in their order, for equal scores
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    candidates = torch.cat([grouped[rows, groups].flatten(1), scores[:, count * GROUP :]], dim=1)
    reach = candidates >= levels[:, k - 1 : k]
    unsure = (levels[:, k] == levels[:, k - 1]) | (reach.sum(dim=1) > 2 * k)
    values, position = _sorted_where(reach & ~unsure[:, None], candidates, k)
    groups = F.pad(groups, (0, 1), value=count)  # what fills no group stands behind the last
    index = groups.gather(1, position // GROUP) * GROUP + position % GROUP
    for some in torch.split(unsure.nonzero().squeeze(1), 64):  # few at a time: they are copied
        values[some], index[some] = _top_directly(scores[some], k)
    return values, index


def _sorted_where(
    chosen: Bool[Tensor, "q n"], scores: Float[Tensor, "q n"], k: int
) -> tuple[Tensor, Tensor]:
    """The k best of the chosen scores of each row and their columns; equal ones in order."""
    rows, columns = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(dim=1)
    width = max([k, *counts.tolist()])
    position = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = scores.new_full((len(scores), width), -torch.inf)
    index = columns.new_zeros(len(scores), width)
    values[rows, position], index[rows, position] = scores[rows, columns], columns
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index.gather(1, order[:, :k])


def _top_directly(scores: Float[Tensor, "q n"], k: int) -> tuple[Tensor, Tensor]:
    values, index = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    values, index = values[:, :k].clone(), index[:, :k].clone()
    for rows in torch.split(tied.nonzero().squeeze(1), 64):
        some = scores[rows]
        values[rows], index[rows] = _sorted_where(some >= values[rows, -1:], some, k)
    return values, index
