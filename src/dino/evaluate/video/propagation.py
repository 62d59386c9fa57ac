"""Labels propagated from frame to frame by the similarity of patches (section 4.2.2, Table 5).

Nothing is trained. A patch of a new frame takes the labels of the few patches most similar to it
in earlier frames, within a window. The published code computes the affinities of
all pairs of patches and sets those outside of the window to zero. Here the new frame is cut into
tiles, and a tile is compared only with the sources in the windows of its patches: the same labels,
work proportional to the number of patches times the window, and memory of one tile.

Shapes: n frames of context, D width, C labels, h w patches, P = h * w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dino.files import UserError

TILE = 16
"""Patches a side of a tile, at most. Of 8 to 30, the fastest with the paper's window on a CPU at
patch 16, and level with the fastest at patch 8: smaller tiles have less to compute, larger ones are
multiplied more efficiently."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Which patches give their labels, with which weight; the defaults are the paper's.

    Attributes:
        radius: how many patches up, down, left and right of its own place a patch may find its
            sources; None for anywhere. In patches of any size, as in the published code.
        neighbours: how many sources count, over all frames of context; equal ones to the last count
            as well.
        temperature: a source weighs exp(cosine similarity / temperature).

    Raises:
        UserError: for a negative radius, no neighbours or a temperature that is not positive.
    """

    radius: int | None = 12
    neighbours: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.radius is not None and self.radius < 0:
            raise UserError(f"the radius of the window cannot be negative: {self.radius}")
        if self.neighbours < 1:
            raise UserError(f"at least one neighbour must give its label, not {self.neighbours}")
        if not self.temperature > 0:
            raise UserError(f"the temperature must be positive, not {self.temperature}")


PAPER = Neighbourhood()


@torch.inference_mode()
def propagate(
    target: Float[Tensor, "D h w"],
    context: Float[Tensor, "n D h w"],
    labels: Float[Tensor, "n C h w"],
    how: Neighbourhood = PAPER,
) -> Float[Tensor, "C h w"]:
    """The labels of one frame from those of others.

    Args:
        target: features of the frame, of any length; float64 is computed in float64.
        context: features of the frames that have labels.
        labels: of each patch of the context; any non-negative numbers.
        how: which patches count.

    Returns:
        Means of labels, weighted by the affinities: in each channel between the smallest and the
        largest of the context.
    """
    return _propagate(directions(target), directions(context), labels.permute(0, 2, 3, 1), how)


def directions(features: Float[Tensor, "*n D h w"]) -> Float[Tensor, "*n h w D"]:
    """Features of length one, those of one patch side by side in memory."""
    return F.normalize(features.movedim(-3, -1).contiguous(), dim=-1)


class Propagator:
    """Propagates labels through a video, frame by frame, in constant memory.

    The context of a frame is the first frame and the last ones before it, each with the soft labels
    that it was given: they are neither rounded nor normalised in between.

    Args:
        features: of the first frame.
        labels: of the first frame.
        last: how many frames before a frame belong to its context, beside the first.
        how: which patches count.
    """

    def __init__(
        self,
        features: Float[Tensor, "D h w"],
        labels: Float[Tensor, "C h w"],
        last: int = 7,
        how: Neighbourhood = PAPER,
    ) -> None:
        if last < 0:
            raise UserError(f"the number of last frames cannot be negative: {last}")
        self.how, self.last, self.count = how, last, 1
        first = directions(features)
        self._features = first.new_empty(1 + last, *first.shape)
        self._labels = features.new_empty(1 + last, *labels.shape[1:], len(labels))
        self._features[0], self._labels[0] = first, labels.permute(1, 2, 0)

    @torch.inference_mode()
    def step(self, features: Float[Tensor, "D h w"]) -> Float[Tensor, "C h w"]:
        """The labels of the next frame of the video."""
        used = min(self.count, 1 + self.last)
        target = directions(features)
        labels = _propagate(target, self._features[:used], self._labels[:used], self.how)
        self._add(target, labels)
        return labels

    def remember(self, features: Float[Tensor, "D h w"], labels: Float[Tensor, "C h w"]) -> None:
        """Take the labels of the next frame as given, for the frames after it."""
        self._add(directions(features), labels)

    def _add(self, target: Tensor, labels: Tensor) -> None:
        if self.last:
            place = 1 + (self.count - 1) % self.last  # of the oldest frame but the first
            self._features[place], self._labels[place] = target, labels.permute(1, 2, 0)
        self.count += 1


def _propagate(
    target: Float[Tensor, "h w D"],
    context: Float[Tensor, "n h w D"],
    labels: Float[Tensor, "n h w C"],
    how: Neighbourhood,
) -> Float[Tensor, "C h w"]:
    height, width = target.shape[:2]
    radius = max(height, width) if how.radius is None else how.radius
    result = labels.new_empty(height, width, labels.shape[-1])
    for rows, source_rows in _spans(height, radius):
        for columns, source_columns in _spans(width, radius):
            queries = target[rows, columns].flatten(0, 1)
            sources = context[:, source_rows, source_columns].flatten(0, 2)
            # BLAS is fastest with the larger matrix as rows and the smaller padded to 8.
            few = F.pad(queries, (0, 0, 0, -len(queries) % 8))
            scores = (sources @ few.T)[:, : len(queries)].unflatten(0, (len(context), -1))
            near = _near(source_rows, rows, radius, target.device)[:, None, :, None]
            near = near & _near(source_columns, columns, radius, target.device)[:, None]
            given = labels[:, source_rows, source_columns].flatten(1, 2)
            means = _means(scores, near.flatten(2).flatten(0, 1), given, how)
            result[rows, columns] = means.view_as(result[rows, columns])
    return result.permute(2, 0, 1)


def _spans(length: int, radius: int) -> Iterator[tuple[slice, slice]]:
    """Spans of about equal length, each with the part of the axis that its windows cover."""
    count = -(-length // TILE)
    for index in range(count):
        start, stop = length * index // count, length * (index + 1) // count
        yield slice(start, stop), slice(max(0, start - radius), min(length, stop + radius))


def _near(
    sources: slice, targets: slice, radius: int, device: torch.device
) -> Bool[Tensor, "sources targets"]:
    places = [torch.arange(part.start, part.stop, device=device) for part in (sources, targets)]
    return (places[0][:, None] - places[1]).abs() <= radius


def _means(
    scores: Float[Tensor, "n s t"],
    near: Bool[Tensor, "s t"],
    labels: Float[Tensor, "n s C"],
    how: Neighbourhood,
) -> Float[Tensor, "t C"]:
    """Mean labels of the sources with the highest scores, weighted by their affinities."""
    values, frame, place = _highest(scores, near, how.neighbours + 1)
    count = min(how.neighbours, values.shape[1])
    best, last = values[:, :1], values[:, count - 1 : count]
    weights = ((values[:, :count] - best) / how.temperature).exp()
    means = torch.einsum("tk,tkc->tc", weights, labels[frame[:, :count], place[:, :count]])
    means /= weights.sum(dim=1, keepdim=True)
    tied = ((values[:, count:] == last) & last.isfinite()).any(dim=1)
    if tied.any():  # as where a frame is repeated: all sources equal to the last one count
        few = scores[:, :, tied].masked_fill(~near[:, tied], -torch.inf).flatten(0, 1).T
        affinities = ((few - best[tied]) / how.temperature).exp() * (few >= last[tied])
        means[tied] = affinities @ labels.flatten(0, 1) / affinities.sum(dim=1, keepdim=True)
    return means


def _highest(
    scores: Float[Tensor, "n s t"], near: Bool[Tensor, "s t"], k: int
) -> tuple[Float[Tensor, "t k"], Int64[Tensor, "t k"], Int64[Tensor, "t k"]]:
    """The k highest scores of each target that are near, their frames and their places.

    First the k places with the highest score in any frame: they hold the k highest scores of all,
    since every higher score is at one of them. Then the best of these k times n.
    """
    summit = scores.amax(dim=0).masked_fill_(~near, -torch.inf).T.contiguous()
    summits, places = summit.topk(min(k, summit.shape[1]), dim=1)  # [t, k]
    column = torch.arange(len(places), device=places.device)[:, None]
    found = scores[:, places, column].masked_fill_(summits == -torch.inf, -torch.inf)  # [n, t, k]
    values, index = found.transpose(0, 1).flatten(1).topk(min(k, found[:, 0].numel()), dim=1)
    frame, which = index // places.shape[1], index % places.shape[1]
    return values, frame, places.gather(1, which)


def stretched(labels: Float[Tensor, "C h w"]) -> Float[Tensor, "C h w"]:
    """Each label from 0 to 1 over the frame, as the published code does before it compares them.

    A label that is the same everywhere stays what it is.
    """
    low, high = labels.amin(dim=(1, 2), keepdim=True), labels.amax(dim=(1, 2), keepdim=True)
    varied = (high > 0) & (high > low)
    return torch.where(varied, (labels - low) / torch.where(varied, high - low, 1), labels)
