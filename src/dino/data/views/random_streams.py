"""Every random number of the data: orders of epochs, substitutes, parameters of views.

All randomness of image `index` in `epoch` comes from `generator(seed, epoch, index)`, so the views
are the same for any number of workers and ranks, any batch size, and after a resume.
Nothing here touches a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from dino.data.views.view_spec import JITTER_OPERATIONS, NEVER_SOLARIZE, ViewSpec, expand

WINDOW = 16
"""Blocks of images whose order is mixed (see `epoch_order`)."""

_ORDERS = tuple(permutations(range(len(JITTER_OPERATIONS))))
_TRIES = 10  # of a box, as in torchvision
_BOX_DRAWS = 2 * _TRIES + 2  # area and aspect of each try, then the row and the column
_DRAWS = _BOX_DRAWS + 11  # uniform numbers that one view takes; `_view` names the others

# The second word of the Philox key keeps the views' stream apart from the sampler's.
_VIEWS_STREAM, _ORDER_STREAM, _SUBSTITUTE_STREAM = 0, 1, 2


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of every random number of image `index` in `epoch`.

    Philox is a cipher of its counter, so any two images have independent streams, and starting one
    costs microseconds. Each stream is 2**128 numbers long before it meets the next image's.
    """
    return _philox(seed, _VIEWS_STREAM, index, epoch)


def epoch_order(
    length: int, seed: int, epoch: int, blocks: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The order in which `epoch` visits a data set: a permutation of `range(length)`, int64.

    `blocks` are lengths of the runs of images that lie together on a disk or server (the shards of
    `dino.data.sources.shards`), which make up `length`. More than `WINDOW` of them are shuffled and
    split into equal windows of at most `WINDOW`, and the images are shuffled within each window, so
    that few files are read at a time. Fewer make no difference.
    """
    rng = _philox(seed, _ORDER_STREAM, 0, epoch)
    if blocks is None or len(blocks) <= WINDOW:
        return rng.permutation(length)
    stops = np.cumsum(blocks, dtype=np.int64)
    starts = stops - np.asarray(blocks, dtype=np.int64)
    windows = np.array_split(rng.permutation(len(blocks)), math.ceil(len(blocks) / WINDOW))
    runs = [[np.arange(starts[block], stops[block]) for block in window] for window in windows]
    return np.concatenate([rng.permutation(np.concatenate(window)) for window in runs])


def substitutes(length: int, seed: int, epoch: int, index: int) -> Iterator[int]:
    """Images to take, in this order, in place of image `index`, which cannot be used."""
    rng = _philox(seed, _SUBSTITUTE_STREAM, index, epoch)
    while True:
        yield int(rng.integers(length))


def _philox(seed: int, stream: int, high: int, highest: int) -> np.random.Generator:
    counter = np.array([0, 0, high, highest], dtype=np.uint64)
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


# ---------------------------------------------------------------------------------- drawing
@dataclass(frozen=True)
class ViewParams:
    """Every number that makes one view of one image.

    Attributes:
        box: top, left, height, width of the crop in pixels of the image.
        flip: mirror the crop horizontally.
        jitter: whether the four factors are applied at all.
        brightness: factor; 1 leaves the image as it is.
        contrast: factor.
        saturation: factor.
        hue: shift in turns of the colour wheel.
        order: the four operations as indices into `JITTER_OPERATIONS`, first to last.
        grey: drop the colour.
        sigma: of the blur in pixels of the view; 0 for none.
        solarize: threshold from which values are inverted; 256 for none.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]
    grey: bool
    sigma: float
    solarize: float

    def row(self) -> tuple[float, ...]:
        """What the device needs, one number for each name in `PHOTOMETRIC`."""
        factors = (self.brightness, self.contrast, self.saturation, self.hue)
        later = (self.grey, self.sigma, self.solarize)
        return tuple(map(float, (self.jitter, *factors, *self.order, *later)))


def draw_views(
    specs: Sequence[ViewSpec], height: int, width: int, rng: np.random.Generator
) -> list[ViewParams]:
    """Draw the parameters of every view of an image of `height` x `width` pixels.

    Each view of `expand(specs)` takes the same number of uniform numbers from `rng`, whether it
    uses them or not: first the box (ten tries of area and aspect, then the place), then flip,
    jitter, order, the four factors, grey, blur, sigma, solarise. So view v of an image does not
    change when later views are added or probabilities change.
    """
    views = expand(specs)
    uniform = rng.random((len(views), _DRAWS)).tolist()
    return [_view(spec, height, width, row) for spec, row in zip(views, uniform, strict=True)]


def _view(spec: ViewSpec, height: int, width: int, uniform: list[float]) -> ViewParams:
    flip, jitter, order, brightness, contrast, saturation, hue, grey, blur, sigma, solarize = (
        uniform[_BOX_DRAWS:]
    )
    return ViewParams(
        box=crop_box(spec, height, width, uniform[:_BOX_DRAWS]),
        flip=flip < spec.flip,
        jitter=jitter < spec.jitter,
        brightness=_factor(spec.brightness, brightness),
        contrast=_factor(spec.contrast, contrast),
        saturation=_factor(spec.saturation, saturation),
        hue=_between(-spec.hue, spec.hue, hue),
        order=_ORDERS[int(order * len(_ORDERS))],
        grey=grey < spec.grey,
        sigma=_between(*spec.blur_sigma, sigma) if blur < spec.blur else 0.0,
        solarize=spec.solarize_threshold if solarize < spec.solarize else NEVER_SOLARIZE,
    )


def crop_box(
    spec: ViewSpec, height: int, width: int, uniform: Sequence[float]
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) by the law of torchvision's `RandomResizedCrop`.

    The area is uniform in `spec.scale`, the logarithm of the aspect in `spec.ratio`, the place
    uniform. After ten boxes that do not fit, the largest centred one of an allowed aspect is taken.
    `uniform` are 22 numbers from [0, 1): area and aspect of each try, then the row, the column.
    """
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for attempt in range(_TRIES):
        area = height * width * _between(*spec.scale, uniform[2 * attempt])
        aspect = math.exp(_between(low, high, uniform[2 * attempt + 1]))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(uniform[-2] * (height - box_height + 1))
            left = int(uniform[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < spec.ratio[0]:
        box_height = max(1, round(width / spec.ratio[0]))
    elif width / height > spec.ratio[1]:
        box_width = max(1, round(height * spec.ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


def _factor(strength: float, uniform: float) -> float:
    return _between(max(0.0, 1.0 - strength), 1.0 + strength, uniform)
