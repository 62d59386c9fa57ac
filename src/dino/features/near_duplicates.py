"""Near duplicates among many images: pairs above a similarity, joined into groups.

Similarities exist tile by tile only, so memory does not grow with the square of the images.

Shapes: n images, D width.
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
    for top in range(0, len(features), tile):
        rows = directions(features[top : top + tile], device)
        for left in range(top, len(features), tile):
            columns = rows if left == top else directions(features[left : left + tile], device)
            close = rows @ columns.T >= threshold
            if left == top:
                close = close.triu(1)
            yield close.nonzero().cpu() + torch.tensor([top, left])


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
        for pairs in similar_pairs(features, threshold, tile=tile, device=device):
            labels = _connected(labels, pairs)
            advance(1)
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
