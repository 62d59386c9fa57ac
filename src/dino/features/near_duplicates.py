"""Near duplicates among many images: pairs above a similarity, joined into groups.

Similarities exist tile by tile only, so memory does not grow with the square of the images. Most
pairs are excluded by an upper bound from few numbers: in a rotation after which the first m of D
numbers hold most of the length, x y <= x1 y1 + |x2| |y2|, a product of m + 1 numbers. What reaches
the threshold is computed in full, so that the pairs are exact.

Shapes: n images, D width, m numbers of the bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dino.features.search import directions
from dino.progress import bar

Group = list[tuple[int, float]]
"""Images that are connected by similar pairs, as indices, each with its similarity to the first:
the one nearest to the mean of all (or its equal), then the most similar to it."""


SAMPLE = 2**11
"""Images from which the rotation and m are chosen."""

HEADS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Values of m to choose from."""

PAIR_COST = 40
"""What a pair that is computed in full costs, in those of one of a matrix product."""

MARGIN = 1e-5
"""Below the threshold, for rounding of the bound in float32."""


@torch.inference_mode()
def similar_pairs(
    features: Float[Tensor, "n D"],
    threshold: float,
    *,
    tile: int = 2**12,
    device: torch.device | str | None = None,
) -> Iterator[Int[Tensor, "pairs 2"]]:
    """All pairs i < j of cosine similarity `threshold` or more, tile by tile, on the CPU.

    Args:
        features: float64 is computed in float64, all else in float32.
        threshold: -1 to 1.
        tile: tile x tile similarities exist at once.
        device: where to compute; by default where `features` are.
    """
    device = torch.device(device) if device is not None else features.device
    heads = bounding_heads(features, threshold, device) if len(features) > 2 * tile else None
    for top in range(0, len(features), tile):
        rows = features[top : top + tile]
        for left in range(top, len(features), tile):
            columns = features[left : left + tile]
            close = None
            if heads is not None:
                first, second = heads[top : top + tile], heads[left : left + tile]
                close = _candidates(first, second, threshold - MARGIN, left == top)
                if len(close) * PAIR_COST < len(rows) * len(columns):
                    close = _verified(rows, columns, close, threshold, device)
                else:  # a tile of equals
                    close = None
            if close is None:
                first, second = (directions(one, device) for one in (rows, columns))
                close = _candidates(first, second, threshold, left == top)
            yield close.cpu() + torch.tensor([top, left])


def bounding_heads(
    features: Float[Tensor, "n D"], threshold: float, device: torch.device
) -> Float[Tensor, "n _"] | None:
    """Rows whose products are upper bounds of cosines; None where a full product costs less."""
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    sample = directions(features[chosen].double(), device)
    rotation = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)
    width, costs = len(rotation), dict[int, float]()
    for m in (m for m in HEADS if m < width):
        rows = _head(sample, rotation[:, :m])
        pairs = _candidates(rows, rows, threshold - MARGIN, True)
        share = 2 * len(pairs) / len(sample) ** 2
        costs[m] = m + 1 + share * PAIR_COST * width
    best = min(costs, key=lambda m: costs[m], default=width)
    if costs.get(best, width) > 0.7 * width:
        return None
    blocks = (directions(rows, device) for rows in features.split(2**14))
    return torch.cat([_head(rows, rotation[:, :best].to(rows.dtype)) for rows in blocks])


def _head(rows: Float[Tensor, "n D"], rotation: Float[Tensor, "D m"]) -> Float[Tensor, "n _"]:
    """The first numbers of rotated rows of length 1, and the length of the others, rounded up."""
    first = rows @ rotation
    left = (1 - first.square().sum(dim=1, keepdim=True)).clamp(min=0)
    return torch.cat([first, (left + 1e-6).sqrt()], dim=1)


def _candidates(
    rows: Float[Tensor, "r w"], columns: Float[Tensor, "c w"], threshold: float, diagonal: bool
) -> Int[Tensor, "pairs 2"]:
    """The places whose product reaches the threshold; of a diagonal tile, right of the diagonal."""
    products = rows @ columns.T
    if diagonal:
        return (products >= threshold).triu(1).nonzero()
    reached = (products.amax(dim=1) >= threshold).nonzero().squeeze(1)
    places = (products[reached] >= threshold).nonzero()
    return torch.stack([reached[places[:, 0]], places[:, 1]], dim=1)


def _verified(
    rows: Float[Tensor, "r D"],
    columns: Float[Tensor, "c D"],
    places: Int[Tensor, "pairs 2"],
    threshold: float,
    device: torch.device,
) -> Int[Tensor, "_ 2"]:
    """Those of the places whose cosine reaches the threshold."""
    if len(places) == 0:
        return places
    first, second = (
        directions(side[places[:, number].to(side.device)], device)
        for number, side in enumerate((rows, columns))
    )
    return places[(first * second).sum(dim=1) >= threshold]


def groups(
    features: Float[Tensor, "n D"],
    threshold: float,
    known: Sequence[tuple[int, int]] = (),
    *,
    tile: int = 2**12,
    device: torch.device | str | None = None,
) -> list[Group]:
    """Groups of two images or more, the largest first, among equals in the order of the images.

    Args:
        features: of the images.
        threshold: cosine similarity from which two images are connected.
        known: pairs that are connected whatever their features.
        tile: see `similar_pairs`.
        device: where to compute.
    """
    labels = _connected(np.arange(len(features)), torch.tensor(known).reshape(-1, 2))
    strips = -(-len(features) // tile)
    with bar("pairs", strips * (strips + 1) // 2) as advance:
        waiting: list[Tensor] = []
        for pairs in similar_pairs(features, threshold, tile=tile, device=device):
            waiting.append(pairs)
            if sum(map(len, waiting)) > len(features):  # joining takes a pass over all images
                labels, waiting = _connected(labels, torch.cat(waiting)), []
            advance(1)
        labels = _connected(labels, torch.cat([torch.empty(0, 2, dtype=torch.int64), *waiting]))
    found: dict[int, list[int]] = defaultdict(list)
    for image, label in enumerate(labels.tolist()):
        found[label].append(image)
    components = sorted((m for m in found.values() if len(m) > 1), key=lambda m: (-len(m), m))
    return [_ordered(members, features) for members in components]


def copy_to_keep(sizes: Mapping[str, tuple[int, int]]) -> str:
    """The path of the largest image, by pixels, then bytes; among equals the first name.

    Args:
        sizes: height and width of the images of a group, by path.
    """

    def order(path: str) -> tuple[int, int, str]:
        height, width = sizes[path]
        return -height * width, -Path(path).stat().st_size if Path(path).is_file() else 0, path

    return min(sizes, key=order)


def _connected(
    labels: Int[np.ndarray, " n"], pairs: Int[Tensor, "pairs 2"]
) -> Int[np.ndarray, " n"]:
    """The component of each image, given those so far and more connected pairs."""
    if len(pairs) == 0:
        return labels
    first, second = labels[pairs.numpy().T]
    graph = coo_matrix((np.ones(len(pairs), bool), (first, second)), (len(labels), len(labels)))
    component: Int[np.ndarray, " n"] = connected_components(graph, directed=False)[1]
    return component[labels]


def _ordered(members: list[int], features: Float[Tensor, "n D"]) -> Group:
    rows = F.normalize(features[members].double(), dim=1)
    first = int((rows @ rows.mean(dim=0)).argmax())
    similarity = (rows @ rows[first]).clamp(-1, 1)  # rounding may exceed 1
    similarity[(rows == rows[first]).all(dim=1)] = 1.0  # also of zeros, which have no direction
    order = similarity.argsort(descending=True, stable=True).tolist()
    return [(members[i], s) for i, s in zip(order, similarity[order].tolist(), strict=True)]
