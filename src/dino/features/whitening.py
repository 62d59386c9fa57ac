"""Whitening: an affine map after which features vary equally in all directions.

Shapes: n images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Covariance = Literal["reference", "centred"]

FLOOR = 1e-5
"""Variances below this share of the largest are raised to it (published code)."""

ROWS = 2**14
"""Features at a time."""


@dataclass(frozen=True)
class Whitening:
    """An affine map learned from features.

    Attributes:
        mean: of the features, which is subtracted.
        directions: columns, each an eigenvector over the root of its variance; largest first.
    """

    mean: Float[Tensor, " D"]
    directions: Float[Tensor, "D D"]

    @classmethod
    def learn(
        cls,
        features: Float[Tensor, "n D"],
        covariance: Covariance = "reference",
        ridge: float | None = None,
    ) -> Whitening:
        """Learn from features, in float64.

        Args:
            features: of other images, or of the images that will be whitened.
            covariance: "reference" takes the second moment of features that are not centred, as
                the published code does, though it subtracts the mean when it applies the result;
                "centred" takes the covariance.
            ridge: instead of the floor, add this share of the mean variance to each variance. Then
                small differences stay small, also where images are fewer than numbers in a feature.
        """
        count, width = features.shape
        mean = torch.zeros(width, dtype=torch.float64)
        for rows in torch.split(features, ROWS):
            mean += rows.double().sum(dim=0) / count
        offset = mean if covariance == "centred" else torch.zeros_like(mean)
        moment = torch.zeros(width, width, dtype=torch.float64)
        for rows in torch.split(features, ROWS):
            shifted = rows.double() - offset
            moment += shifted.T @ shifted / count
        variance, vectors = torch.linalg.eigh(moment)
        variance, vectors = variance.flip(0).clamp(min=0), vectors.flip(1)
        if ridge is None:
            variance = variance.clamp(min=FLOOR * variance[0].item())
        else:
            rank = max(1, min(count - (covariance == "centred"), width))
            variance = variance + ridge * variance.sum() / rank
        # Equal images have no variance: the map is then zero, not infinite.
        scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
        return cls(mean, vectors * scale)

    def __call__(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Whiten features; computed in float64, returned in their type."""
        result = torch.empty_like(features)
        for rows, whitened in zip(features.split(ROWS), result.split(ROWS), strict=True):
            whitened.copy_((rows.double() - self.mean) @ self.directions)
        return result
