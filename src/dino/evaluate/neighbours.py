"""Exact search for the most similar features, in bounded memory.

Similarities exist tile by tile only, so memory does not grow with the bank, and the k best are
exact: equal similarities keep the order of the bank, whatever the tiles.

Shapes: n images of the bank, q queries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@torch.inference_mode()
def nearest(
    queries: Float[Tensor, "q D"],
    bank: Float[Tensor, "n D"],
    k: int,
    *,
    skip: int | None = None,
    chunk: int = 512,
    tile: int = 2**16,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k bank images of highest cosine similarity, best first, and the similarities.

    Among equal similarities the lower index wins. At most chunk x tile similarities exist at once.

    Args:
        queries: features; all of them are moved to `device`.
        bank: features; moved to `device` tile by tile.
        k: neighbours, at most n (with `skip`: n - 1).
        skip: if not None, query i may not find image `skip + i` of the bank: itself.
        chunk: queries at a time.
        tile: bank images at a time.
        device: where to compute; by default where `queries` are.
    """
    device = torch.device(device) if device is not None else queries.device
    queries = directions(queries, device)
    similarity = queries.new_full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    room = queries.new_empty(min(chunk, len(queries)) * min(tile, len(bank)))
    for first in range(0, len(bank), tile):
        block = directions(bank[first : first + tile], device)
        for start in range(0, len(queries), chunk):
            rows = slice(start, min(start + chunk, len(queries)))
            size = (rows.stop - start, len(block))
            scores = torch.mm(queries[rows], block.T, out=room[: size[0] * size[1]].view(size))
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
    """`scores.topk(k)`, but equal scores in the order of their index, also across the edge."""
    values, index = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    values, index = values[:, :k].clone(), index[:, :k].clone()
    if tied.any():
        for rows in torch.split(tied.nonzero().squeeze(1), 64):  # few at a time: they are copied
            values[rows], index[rows] = _top_in_order(scores[rows], values[rows, -1:], k)
    return values, index


def _top_in_order(scores: Tensor, last: Float[Tensor, "q 1"], k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, given the k-th value: all above it, then the first equal ones."""
    above, level = scores > last, scores == last
    vacant = k - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= vacant))
    index = chosen.nonzero()[:, 1].view(len(scores), k)
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)
