"""Near duplicates among many images: pairs above a similarity, joined into groups.

Similarities exist tile by tile only, so memory does not grow with the square of the images.

Shapes: n images, D width.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino.evaluate.features.search import directions
from dino.progress import bar


@dataclass(frozen=True)
class Group:
    """Images that are connected by similar pairs.

    Attributes:
        members: indices, first the one nearest to the mean of all (or its equal), then the most
            similar to it.
        similarity: of each member to the first.
    """

    members: list[int]
    similarity: list[float]


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
    progress: bool = False,
) -> list[Group]:
    """Groups of two images or more, the largest first, among equals in the order of the images.

    Args:
        features: of the images.
        threshold: cosine similarity from which two images are connected.
        known: pairs that are connected whatever their features.
        tile: see `similar_pairs`.
        device: where to compute.
        progress: show a bar on a terminal.
    """
    sets = _DisjointSets(len(features))
    sets.add(torch.tensor(known, dtype=torch.int64).reshape(-1, 2))
    strips = -(-len(features) // tile)
    with bar("pairs", strips * (strips + 1) // 2, shown=progress) as advance:
        for pairs in similar_pairs(features, threshold, tile=tile, device=device):
            sets.add(pairs)
            advance(1)
    return [_ordered(members, features) for members in sets.components()]


def _ordered(members: list[int], features: Float[Tensor, "n D"]) -> Group:
    rows = F.normalize(features[members].double(), dim=1)
    first = int((rows @ rows.mean(dim=0)).argmax())
    similarity = (rows @ rows[first]).clamp(-1, 1)  # rounding may exceed 1
    similarity[(rows == rows[first]).all(dim=1)] = 1.0  # also of zeros, which have no direction
    order = similarity.argsort(descending=True, stable=True).tolist()
    return Group([members[i] for i in order], similarity[order].tolist())


class _DisjointSets:
    """Disjoint sets of images; `root` holds for each the smallest image of its set."""

    def __init__(self, count: int) -> None:
        self.root = torch.arange(count)

    def add(self, pairs: Int[Tensor, "pairs 2"]) -> None:
        """Join the sets of the two images of each pair."""
        sets = self.root[pairs]
        sets = sets[sets[:, 0] != sets[:, 1]]
        while len(sets):
            # Of each set the smallest partner becomes the parent, where it is smaller.
            low, high = sets.amin(dim=1), sets.amax(dim=1)
            parent = torch.arange(len(self.root)).scatter_reduce(0, high, low, "amin")
            while not torch.equal(above := parent[parent], parent):
                parent = above
            self.root, sets = parent[self.root], parent[sets]
            sets = sets[sets[:, 0] != sets[:, 1]]

    def components(self) -> list[list[int]]:
        """All sets of two or more."""
        found: dict[int, list[int]] = defaultdict(list)
        for image, root in enumerate(self.root.tolist()):
            found[root].append(image)
        return sorted((m for m in found.values() if len(m) > 1), key=lambda m: (-len(m), m))


def equal_files(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of files with the same bytes, each with the first such file."""
    sizes: dict[int, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        if (file := Path(path)).is_file():
            sizes[file.stat().st_size].append(index)
    pairs = []
    for same in (indices for indices in sizes.values() if len(indices) > 1):
        first: dict[bytes, int] = {}
        for index in same:
            digest = hashlib.sha256(Path(paths[index]).read_bytes()).digest()
            if (other := first.setdefault(digest, index)) != index:
                pairs.append((other, index))
    return pairs
