"""Labels propagated from frame to frame by the similarity of patches (section 4.2.2, Table 5).

Nothing is trained. A patch of a new frame takes the labels of the few patches most similar to it
in earlier frames, within a window. The published code computes the affinities of all pairs of
patches and sets those outside of the window to zero. Here the new frame is divided into tiles, and
a tile is compared only with the sources in the windows of its patches: the same labels, work
proportional to the number of patches times the window, and memory of one tile.

Shapes: n frames of context, D width, C labels, h w patches, s sources and t patches of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dino.settings import Range, validated

TILE = 16
"""Patches a side of a tile, at most. Of 8 to 30, the fastest with the paper's window on a CPU at
patch 16, and level with the fastest at patch 8: smaller tiles have less to compute, larger ones are
multiplied more efficiently."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Which patches give their labels, with which weight; the defaults are the paper's.

    Raises:
        UserError: for a value that is out of range.
    """

    radius: Annotated[int, Range(low=0)] | None = 12
    """How many patches away in each direction the sources of a patch may lie; None for anywhere."""
    neighbours: Annotated[int, Range(low=1)] = 5
    """How many patches, of all frames of context, give their labels to one (more in a tie)."""
    temperature: Annotated[float, Range(above=0)] = 0.1
    """A source weighs exp(cosine similarity / temperature)."""
    last_frames: Annotated[int, Range(low=0)] = 7
    """How many frames before a frame give it labels, beside the first."""

    def __post_init__(self) -> None:
        validated(self)


def directions(features: Float[Tensor, "*n D h w"]) -> Float[Tensor, "*n h w D"]:
    """Features of length one, those of one patch side by side in memory."""
    return F.normalize(features.movedim(-3, -1).contiguous(), dim=-1)


class Propagator:
    """Propagates labels through a video, frame by frame, in constant memory.

    The context of a frame is the first frame and the last ones before it, each with its soft
    labels, which are neither rounded nor normalised in between.

    Args:
        features: of the first frame.
        labels: of the first frame.
        how: which frames and patches count.
    """

    def __init__(
        self, features: Float[Tensor, "D h w"], labels: Float[Tensor, "C h w"], how: Neighbourhood
    ) -> None:
        self.how, self.count, size = how, 1, 1 + how.last_frames
        first = directions(features)
        self._features = first.new_empty(size, *first.shape)
        self._labels = features.new_empty(size, *labels.shape[1:], len(labels))
        self._features[0], self._labels[0] = first, labels.permute(1, 2, 0)

    @torch.inference_mode()
    def step(self, features: Float[Tensor, "D h w"]) -> Float[Tensor, "C h w"]:
        """The labels of the next frame of the video."""
        last = self.how.last_frames
        context = slice(min(self.count, 1 + last))
        target = directions(features)
        labels = propagate(target, self._features[context], self._labels[context], self.how)
        if last:
            oldest = 1 + (self.count - 1) % last  # but for the first frame, which stays
            self._features[oldest], self._labels[oldest] = target, labels
        self.count += 1
        return labels.permute(2, 0, 1)


@torch.inference_mode()
def propagate(
    target: Float[Tensor, "h w D"],
    context: Float[Tensor, "n h w D"],
    labels: Float[Tensor, "n h w C"],
    how: Neighbourhood,
) -> Float[Tensor, "h w C"]:
    """The labels of one frame from those of others.

    Args:
        target: features of the frame, of length one; float64 is computed in float64.
        context: features of the frames that have labels, of length one.
        labels: of each patch of the context; any non-negative numbers.
        how: which patches count.

    Returns:
        Means of labels, weighted by the affinities: in each channel between the smallest and the
        largest of the context.
    """
    height, width = target.shape[:2]
    radius = max(height, width) if how.radius is None else how.radius
    result = labels.new_empty(height, width, labels.shape[-1])
    for rows, source_rows in _spans(height, radius):
        for columns, source_columns in _spans(width, radius):
            queries = target[rows, columns].flatten(0, 1)
            sources = context[:, source_rows, source_columns].flatten(0, 2)
            # BLAS is fastest with the larger matrix as rows and the smaller padded to 8.
            padded = F.pad(queries, (0, 0, 0, -len(queries) % 8))
            scores = (sources @ padded.T)[:, : len(queries)].unflatten(0, (len(context), -1))
            near = _near(source_rows, rows, radius, target.device)[:, None, :, None]
            near = near & _near(source_columns, columns, radius, target.device)[:, None]
            given = labels[:, source_rows, source_columns].flatten(1, 2)
            means = _means(scores, near.flatten(2).flatten(0, 1), given, how)
            result[rows, columns] = means.view_as(result[rows, columns])
    return result


def _spans(length: int, radius: int) -> Iterator[tuple[slice, slice]]:
    """Spans of about equal length, each with the span that its windows cover."""
    count = -(-length // TILE)
    for index in range(count):
        start, stop = length * index // count, length * (index + 1) // count
        yield slice(start, stop), slice(max(0, start - radius), min(length, stop + radius))


def _near(
    sources: slice, targets: slice, radius: int, device: torch.device
) -> Bool[Tensor, "sources targets"]:
    places = [torch.arange(span.start, span.stop, device=device) for span in (sources, targets)]
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
        scores = scores[:, :, tied].masked_fill(~near[:, tied], -torch.inf).flatten(0, 1).T
        affinities = ((scores - best[tied]) / how.temperature).exp() * (scores >= last[tied])
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

    A label that is the same everywhere is unchanged.
    """
    low, high = labels.amin(dim=(1, 2), keepdim=True), labels.amax(dim=(1, 2), keepdim=True)
    varied = (high > 0) & (high > low)
    return torch.where(varied, (labels - low) / torch.where(varied, high - low, 1), labels)
