"""Label propagation patch by patch, written from paper section 4.2.2 and its published settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def propagate(
    target: Tensor,
    context: Tensor,
    labels: Tensor,
    radius: int | None,
    neighbours: int,
    temperature: float,
) -> Tensor:
    """Labels [C, h, w] of a frame [D, h, w] from frames [n, D, h, w] with labels [n, C, h, w]."""
    _, height, width = target.shape
    result = torch.zeros(labels.shape[1], height, width, dtype=labels.dtype)
    for y in range(height):
        for x in range(width):
            found = []  # (affinity, labels) of every patch in the window, over all frames
            for frame in range(len(context)):
                for v in range(height):
                    for u in range(width):
                        if radius is not None and max(abs(v - y), abs(u - x)) > radius:
                            continue
                        a, b = target[:, y, x], context[frame, :, v, u]
                        cosine = float(a @ b) / float(a.norm() * b.norm())
                        found.append((math.exp(cosine / temperature), labels[frame, :, v, u]))
            affinities = sorted((affinity for affinity, _ in found), reverse=True)
            least = affinities[min(neighbours, len(affinities)) - 1]
            kept = [(affinity, label) for affinity, label in found if affinity >= least]
            total = sum(affinity for affinity, _ in kept)
            for affinity, label in kept:
                result[:, y, x] += affinity / total * label
    return result


def video(
    features: list[Tensor],
    first: Tensor,
    last: int,
    radius: int | None,
    neighbours: int,
    temperature: float,
) -> list[Tensor]:
    """Labels of each frame of a video from those of its first."""
    labels = [first]
    for time in range(1, len(features)):
        used = sorted({0, *range(max(0, time - last), time)})
        labels.append(
            propagate(
                features[time],
                torch.stack([features[i] for i in used]),
                torch.stack([labels[i] for i in used]),
                radius,
                neighbours,
                temperature,
            )
        )
    return labels
