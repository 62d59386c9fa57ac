"""Votes of the nearest neighbours (paper section 3.2 and appendix F.1).

No parameter is trained: the class of an image is voted by its k most similar images of a bank.

Shapes: n images of the bank, q queries, D width, C classes, ks values of k, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.features.search import nearest
from dino.features.table import check_finite
from dino.files import UserError

K = (10, 20, 100, 200)
"""The k of the paper; 20 is its best."""

TEMPERATURE = 0.07
"""The temperature of the votes in the paper."""

PANEL = 2**15
"""Queries whose neighbours are searched during one pass over the bank: each pass moves the
entire bank to the device once, and holds k similarities and indices for each query."""


class Accuracy(NamedTuple):
    """Shares of correctly classified images, in percent, and how many images there are."""

    top1: float
    top5: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.1f} ± {self.standard_error:.1f} / {self.top5:.1f}"

    @property
    def standard_error(self) -> float:
        """Of top-1, in points, see `standard_error`."""
        return standard_error(self.top1, self.images)

    def percentages(self) -> dict[str, float]:
        """Both shares, for JSON."""
        return {"top1": self.top1, "top5": self.top5}

    def score(self) -> dict[str, float]:
        """Top-1 as an entry of `dino.evaluate.command.Scores`."""
        return {"percent": self.top1, "standard_error": self.standard_error}


def standard_error(percent: float, images: int) -> float:
    """The binomial standard error of a share of n images, in points: 100 sqrt(p (1 - p) / n)."""
    share = percent / 100
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / images)


@dataclass(frozen=True)
class Votes:
    """The votes for every query, for each temperature and each k.

    Attributes:
        temperatures: in the order of the request.
        k: ascending, clipped to the bank.
        classes: the labels that occur, ascending; the tensors below hold indices into them.
        hits: queries whose class is first, and among the first min(5, k).
        predicted: the first class of each query.
        truth: the true class of each query.
    """

    temperatures: tuple[float, ...]
    k: list[int]
    classes: Int[Tensor, " C"]
    hits: Int[Tensor, "T ks 2"]
    predicted: Int[Tensor, "T ks q"]
    truth: Int[Tensor, " q"]

    def accuracies(self, temperature: float) -> dict[int, Accuracy]:
        """By k."""
        hits = self.hits[self.temperatures.index(temperature)]
        images = len(self.truth)
        percent = (100 * hits.double() / images).tolist()
        return {
            k: Accuracy(top1, top5, images) for k, (top1, top5) in zip(self.k, percent, strict=True)
        }

    def confusion(self, k: int, temperature: float) -> Int[Tensor, "C C"]:
        """How many queries of each class (row) are predicted as each class (column)."""
        size = len(self.classes)
        predicted = self.predicted[self.temperatures.index(temperature), self.k.index(k)]
        return torch.bincount(self.truth * size + predicted, minlength=size**2).view(size, size)


def knn(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    query_labels: Int[Tensor, " q"],
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    **how: Any,
) -> dict[int, Accuracy]:
    """Accuracies by k, ascending, at one temperature; see `vote`, which takes the same arguments.

    A k beyond the (remaining) bank is clipped to it: the keys are the k after clipping.
    """
    votes = vote(bank, bank_labels, queries, query_labels, k, (temperature,), **how)
    return votes.accuracies(temperature)


@torch.inference_mode()
def vote(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    query_labels: Int[Tensor, " q"],
    k: Sequence[int] = K,
    temperatures: Sequence[float] = (TEMPERATURE,),
    *,
    leave_one_out: bool = False,
    chunk: int = 512,
    tile: int = 2**16,
    device: torch.device | str | None = None,
) -> Votes:
    """Weighted k-nearest-neighbour votes for every k and temperature in one pass (section 3.2).

    The k bank images of highest cosine similarity vote for their class with weight
    exp(similarity / temperature). Classes are ordered by their votes, equal ones (also those
    without any vote) by their label; so does the published code wherever its sort is stable (up to
    16 classes), beyond that its order of equal votes is arbitrary. Top-5 means the first
    min(5, k).

    Features of any length are computed in float64 if they are float64, else in float32. Labels are
    any integers; one that the bank lacks can only be predicted by the tie rule. With
    `leave_one_out`, `queries` are the bank and no image votes for itself. `chunk`, `tile` and
    `device` are those of `nearest`.

    Raises:
        UserError: for sizes that do not fit, features that are not finite, k < 1 or a
            temperature <= 0.
    """
    _check_sizes(bank, bank_labels, queries, query_labels, leave_one_out)
    for features in (bank, queries):
        check_finite(features)
    used = usable_k(k, len(bank) - leave_one_out)
    if not temperatures or not all(temperature > 0 for temperature in temperatures):
        raise UserError(f"the temperature of k-NN must be positive, not {tuple(temperatures)}")
    device = torch.device(device) if device is not None else queries.device
    classes = torch.unique(torch.cat([bank_labels.cpu(), query_labels.cpu()]))
    votes_for = torch.searchsorted(classes, bank_labels.cpu()).to(device)
    truth = torch.searchsorted(classes, query_labels.cpu()).to(device)
    hits = torch.zeros(len(temperatures), len(used), 2, dtype=torch.int64, device=device)
    predicted = []
    for start in range(0, len(queries), PANEL):
        panel = slice(start, start + PANEL)
        skip = start if leave_one_out else None
        sizes: dict[str, Any] = {"chunk": chunk, "tile": tile, "device": device}
        similarity, index = nearest(queries[panel], bank, used[-1], skip=skip, **sizes)
        for near, voted, true in zip(
            torch.split(similarity, chunk),
            torch.split(votes_for[index], chunk),
            torch.split(truth[panel], chunk),
            strict=True,
        ):
            # Relative to the nearest neighbour: same order of classes, no overflow at small T.
            weights = [((near - near[:, :1]) / t).exp_() for t in temperatures]
            counted = [_count(one, voted, true, used, len(classes)) for one in weights]
            hits += torch.stack([one for one, _ in counted])
            predicted.append(torch.stack([one for _, one in counted]))
    return Votes(
        tuple(temperatures), used, classes, hits.cpu(), torch.cat(predicted, 2).cpu(), truth.cpu()
    )


def usable_k(k: Sequence[int], limit: int) -> list[int]:
    """The different k, ascending, none larger than `limit`, the number of possible neighbours.

    Raises:
        UserError: if there is no k, a k below 1, or no image that can vote.
    """
    if not k or min(k) < 1:
        raise UserError(f"k of k-NN must be one or more numbers from 1 on, not {tuple(k)}")
    if limit < 1:
        raise UserError("k-NN needs at least one image in the bank besides the query")
    return sorted({min(n, limit) for n in k})


def _check_sizes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, leave_one_out: bool
) -> None:
    if len(queries) == 0:
        raise UserError("k-NN got no query image")
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        shapes = f"{tuple(bank.shape)} and {tuple(queries.shape)}"
        raise UserError(f"features of bank and queries must be [n, D] and [q, D], not {shapes}")
    if len(bank_labels) != len(bank) or len(query_labels) != len(queries):
        raise UserError("k-NN needs one label for each image of the bank and of the queries")
    if leave_one_out and len(bank) != len(queries):
        raise UserError("leave-one-out needs the bank as queries")


def _count(
    weights: Float[Tensor, "q k"],
    voted: Int[Tensor, "q k"],
    truth: Int[Tensor, " q"],
    used: Sequence[int],
    classes: int,
) -> tuple[Int[Tensor, "ks 2"], Int[Tensor, "ks q"]]:
    """For each k: queries whose class is first, and among the first min(5, k); first classes."""
    votes = weights.new_zeros(len(weights), classes)
    number = torch.arange(classes, device=truth.device)
    counts, firsts = [], []
    for nearer, n in pairwise([0, *used]):  # each k adds to the votes of the k before
        votes.scatter_add_(1, voted[:, nearer:n], weights[:, nearer:n])
        true_votes = votes.gather(1, truth[:, None])
        before = (votes > true_votes) | ((votes == true_votes) & (number < truth[:, None]))
        rank = before.sum(dim=1)
        counts.append(torch.stack([(rank < 1).sum(), (rank < min(5, n)).sum()]))
        best = votes == votes.amax(dim=1, keepdim=True)
        firsts.append(number.expand_as(votes).where(best, classes).amin(dim=1))
    return torch.stack(counts), torch.stack(firsts)
