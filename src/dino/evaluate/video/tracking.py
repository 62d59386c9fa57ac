"""Tracking of the objects of a video from the mask of its first frame (section 4.2.2, Table 5).

Frame by frame: resize, extract patch tokens, propagate labels to them
(`dino.evaluate.video.propagation`), and turn the labels into a mask of the frame's size.

Shapes: C labels (the background first), D width, h w patches, H W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.data.images.decode import read_picture, to_tensor
from dino.data.images.masks import Ids, Mask, read_mask, resized_ids
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.images.preprocessing import LONGEST
from dino.data.views.photometric import normalize
from dino.evaluate.video.davis import Clip
from dino.evaluate.video.propagation import Neighbourhood, Propagator, stretched
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import Precision, autocast, memory_errors
from dino.settings import Range

Normalization = Literal["reference", "weights"]

REFERENCE_STD = (0.228, 0.224, 0.225)
"""The standard deviation of the published script; elsewhere the first value is .229."""

AHEAD = 2
"""Frames that are read while others are computed."""


@dataclass(frozen=True, kw_only=True)
class Tracking(Neighbourhood):
    """How a video is tracked; the defaults are the paper's."""

    size: Annotated[int, Range(low=1)] = 480
    """Shorter side of the network's input in pixels."""
    normalization: Normalization = "reference"
    """reference: normalise frames as the published script, which has .228 instead of .229 as
    ImageNet's first standard deviation. weights: as the weights require."""
    precision: Precision = "fp32"
    """Of the network: fp32, or bf16 for speed. Labels are propagated in fp32."""


@torch.inference_mode()
def track(backbone: Backbone, clip: Clip, how: Tracking = Tracking()) -> Iterator[Mask]:
    """The masks of all frames of a video, in order; the first is the given one.

    Every object of the first mask is tracked; one too small for any patch is found nowhere. (The
    published code has labels from 0 to the largest number of a patch; labels without a patch change
    nothing, so the masks are the same.) The backbone must be in evaluation mode.

    Raises:
        UserError: naming the file that cannot be read, or for a size below one patch.
    """
    first = read_mask(clip.masks[0])
    numbers = np.array([0, *first.objects], dtype=np.uint8)
    device = next(backbone.parameters()).device
    mean, std = statistics_of(backbone, how.normalization)
    propagator = None
    for pixels in _read_ahead(clip.frames, how.size, backbone.patch_size or 1):
        images = normalize(pixels.to(device, non_blocking=True), mean, std)[None]
        with memory_errors("--size"), autocast(device, how.precision):
            features = backbone.features(images).patches[-1, 0]
        features = features.float()
        if propagator is None:
            labels = one_hot(first.ids, numbers, features.shape[1:]).to(device)
            propagator = Propagator(features, labels, how)
            yield first
        else:
            labels = propagator.step(features)
            yield replace(first, ids=mask_of(labels, pixels.shape[1:], numbers, first.ids.shape))


def statistics_of(
    backbone: Backbone, normalization: Normalization
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation by which a network's frames are normalised."""
    mean, std = tuple(backbone.preprocessing.mean), tuple(backbone.preprocessing.std)
    imagenet = (mean, std) == (IMAGENET_MEAN, IMAGENET_STD)
    return mean, REFERENCE_STD if normalization == "reference" and imagenet else std


def working_size(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """Height and width of the network's input, with `size` for the shorter side.

    The longer side is rounded down to a multiple of 64 (480 x 854 becomes 480 x 832), as published,
    but is at least the shorter, and at most 8 times as long. Both are rounded down to complete
    patches.

    Raises:
        UserError: if no patch fits.
    """
    shorter, longer = sorted((height, width))
    long = max(size, int(size * min(longer / shorter, LONGEST) // 64 * 64))
    sides = [side // patch * patch for side in (size, long)]
    if sides[0] == 0:
        raise UserError(f"--size {size} holds no patch of {patch} px")
    return (sides[0], sides[1]) if height <= width else (sides[1], sides[0])


def read_frame(path: Path, size: int, patch: int) -> Float[Tensor, "3 H W"]:
    """A frame at its working size, in integer levels from 0 to 255.

    Bilinear without antialiasing, like OpenCV's, with which the published script reads: on four
    frames of DAVIS (854 to 832 pixels wide) 3 of 10,000 values differed, by one level.
    """
    pixels = to_tensor(read_picture(path))
    height, width = working_size(pixels.shape[1], pixels.shape[2], size, patch)
    return F.interpolate(pixels[None].float(), (height, width), mode="bilinear")[0].round()


def _read_ahead(paths: Sequence[Path], size: int, patch: int) -> Iterator[Float[Tensor, "3 H W"]]:
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(read_frame, path, size, patch) for path in paths[:AHEAD])
        for path in paths[AHEAD:]:
            waiting.append(reader.submit(read_frame, path, size, patch))
            yield waiting.popleft().result()
        yield from (frame.result() for frame in waiting)


def one_hot(ids: Ids, numbers: np.ndarray, grid: Sequence[int]) -> Float[Tensor, "C h w"]:
    """Labels of patches, each that of its middle pixel; void is background."""
    small = resized_ids(ids, grid[0], grid[1])
    known = np.where(np.isin(small, numbers), small, 0)
    return torch.from_numpy((known == numbers[:, None, None]).astype(np.float32))


def mask_of(
    labels: Float[Tensor, "C h w"],
    working: Sequence[int],
    numbers: np.ndarray,
    original: Sequence[int],
) -> Ids:
    """The object of each pixel: labels enlarged, stretched and compared, then the frame's size."""
    large = F.interpolate(labels[None], tuple(working), mode="bilinear")[0]
    winner = stretched(large).argmax(dim=0).to(torch.uint8).cpu().numpy()
    return resized_ids(numbers[winner], original[0], original[1])
