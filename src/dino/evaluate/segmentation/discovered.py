"""An object that is found in an image without labels: its patches, and the box around them.

Shapes: h w patches, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy import ndimage

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


class Discovered(NamedTuple):
    """What a method found in an image.

    Attributes:
        mask: the patches of the object.
        saliency: how much each patch belongs to it, from 0 to 1.
    """

    mask: Bool[np.ndarray, "h w"]
    saliency: Float[np.ndarray, "h w"]

    @property
    def contrast(self) -> float:
        """Mean saliency in the mask minus that of the other patches, from -1 to 1."""
        others = self.saliency[~self.mask]
        return float(self.saliency[self.mask].mean() - (others.mean() if others.size else 0))

    def pixels(self, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
        """The mask of an image that the patches cover, enlarged by nearest neighbours."""
        return _nearest(self.mask, height, width)

    def box(self, height: int, width: int) -> Box:
        """The box of the largest connected part of the mask (4 neighbours), in such an image."""
        parts, count = ndimage.label(self.mask)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        return box_of(_nearest(parts == 1 + sizes.argmax(), height, width))

    def soft(self, height: int, width: int) -> Float[np.ndarray, "{height} {width}"]:
        """The saliency of such an image, enlarged bilinearly."""
        small = torch.from_numpy(self.saliency)[None, None]
        return F.interpolate(small, (height, width), mode="bilinear")[0, 0].numpy()


def box_of(mask: Bool[np.ndarray, "H W"]) -> Box:
    """The smallest box that holds a mask, which is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def stretched(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Values from 0, the smallest, to 1, the largest; 1 where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.ones_like(values)


def connected_to(seed: int, mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The part of a mask that is connected (4 neighbours) with the patch `seed`, which is in it."""
    parts: np.ndarray = ndimage.label(mask)[0]
    return parts == parts.ravel()[seed]


def _nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel from the patch that holds its upper left corner."""
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return mask[rows[:, None], columns]
