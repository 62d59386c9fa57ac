"""What a view of an image is, and every random number it needs (DINO, section 3.2).

Nothing here touches a pixel. A `ViewSpec` says what kind of view is wanted, `draw_views` turns it
into plain numbers (`ViewParams`), and those numbers travel with the crop: the box and the flip are
used by the worker (`dino.data.images.decode.crop_resize`), the rest by the device, as one row of
floats (`dino.data.views.photometric.augment`).

All randomness of image `index` in `epoch` comes from `generator(seed, epoch, index)`, so the views
are the same for any number of workers and ranks, any batch size, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from dino.files import UserError

GLOBAL_VIEWS = 2
"""The first views of every image, which the teacher sees; the others are local."""

PHOTOMETRIC = (
    "jitter",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "first",
    "second",
    "third",
    "fourth",
    "grey",
    "sigma",
    "solarize",
)
"""Names of the columns of `ViewParams.row()`: P = 12."""

JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""What the numbers in the columns "first" to "fourth" stand for."""

WINDOW = 16
"""Blocks of images whose order is mixed (see `epoch_order`)."""

NEVER_SOLARIZE = 256.0
"""A threshold that no pixel value reaches."""

COLOUR_ONLY = ("saturation", "hue", "grey")
"""Fields of `ViewSpec` that mean something for RGB only."""

_ORDERS = tuple(permutations(range(len(JITTER_OPERATIONS))))
_TRIES = 10  # of a box, as in torchvision
_BOX_DRAWS = 2 * _TRIES + 2  # area and aspect of each try, then the row and the column
_DRAWS = _BOX_DRAWS + 11  # uniform numbers that one view takes; `_view` names the others

# The second word of the Philox key keeps the views' stream apart from the sampler's.
_VIEWS_STREAM, _ORDER_STREAM, _SUBSTITUTE_STREAM = 0, 1, 2
_WORD = 2**64


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One kind of view: how many of them, how large, and how strongly they are altered.

    The defaults are those that all views of the reference share. Checked when it is made.

    Args:
        name: for messages and pictures, such as "global1".
        count: views of this kind made from each image, >= 0.
        size: side of the square view in pixels.
        scale: range of the crop's share of the image's area, within (0, 1].
        ratio: range of the crop's width / height; its logarithm is uniform.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter (its four operations in random order).
        brightness: factor from [1 - brightness, 1 + brightness], never below 0.
        contrast: as brightness.
        saturation: as brightness.
        hue: shift from [-hue, hue] turns of the colour wheel, at most 0.5.
        grey: probability of losing all colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels.
        solarize: probability of inverting the values from `solarize_threshold` up.
        solarize_threshold: 0 to 255.

    Raises:
        UserError: if a value lies outside its range, naming it.
    """

    name: str
    count: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 128.0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        self._require(self.count >= 0, "count", "0 or more")
        self._require(self.size >= 1, "size", "1 pixel or more")
        self._require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < low <= high <= 1")
        self._require(0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < low <= high")
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            self._require(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            self._require(0 <= getattr(self, name) < math.inf, name, "0 or more")
        self._require(0 <= self.hue <= 0.5, "hue", "0 to 0.5")
        low, high = self.blur_sigma
        self._require(0 <= low <= high < math.inf, "blur_sigma", "0 <= low <= high")
        self._require(0 <= self.solarize_threshold <= 255, "solarize_threshold", "0 to 255")

    def for_channels(self, channels: int) -> ViewSpec:
        """The same kind of view of images with so many channels.

        Saturation, hue and grey mean something for RGB only and are switched off otherwise.
        """
        off: dict[str, Any] = dict.fromkeys(COLOUR_ONLY, 0.0)
        return self if channels == 3 else replace(self, **off)

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise UserError(
                f"{field} of the view {self.name!r} must be {wanted}, not {getattr(self, field)}"
            )


def dino_views(
    global_size: int = 224,
    global_scale: tuple[float, float] = (0.25, 1.0),
    local_count: int = 10,
    local_size: int = 96,
    local_scale: tuple[float, float] = (0.05, 0.25),
) -> tuple[ViewSpec, ...]:
    """The views of the paper: two global ones that differ in blur and solarise, and local ones.

    Strengths and probabilities are those of the reference implementation (section 3.2: BYOL's two
    views, with multi-crop and the local blur of SwAV).
    With `local_count` 0 only the two globals remain.
    """
    first = ViewSpec(name="global1", count=1, size=global_size, scale=global_scale, blur=1.0)
    second = ViewSpec(
        name="global2", count=1, size=global_size, scale=global_scale, blur=0.1, solarize=0.2
    )
    if local_count == 0:
        return first, second
    local = ViewSpec(name="local", count=local_count, size=local_size, scale=local_scale, blur=0.5)
    return first, second, local


def expand(specs: Sequence[ViewSpec]) -> list[ViewSpec]:
    """The spec of each view of an image, in the order in which the views are made."""
    return [spec for spec in specs for _ in range(spec.count)]


def view_groups(specs: Sequence[ViewSpec]) -> list[range]:
    """Which views travel together: the globals first, then each run of views of one size.

    Returns:
        Ranges over the views in the order of `expand(specs)`; together they cover all of them.

    Raises:
        UserError: if there are not two global views, or they differ in size.
    """
    sizes = [spec.size for spec in expand(specs)]
    if len(sizes) < GLOBAL_VIEWS:
        raise UserError(f"an image needs {GLOBAL_VIEWS} global views, not {len(sizes)}")
    if len(set(sizes[:GLOBAL_VIEWS])) > 1:
        raise UserError(f"the global views must share one size, not {sizes[:GLOBAL_VIEWS]}")
    starts = [0] + [
        view
        for view in range(GLOBAL_VIEWS, len(sizes))
        if view == GLOBAL_VIEWS or sizes[view] != sizes[view - 1]
    ]
    return [
        range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)
    ]


# ---------------------------------------------------------------------------------- randomness
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

    Args:
        length: number of images.
        seed: of the orders.
        epoch: counted from 0.
        blocks: lengths of the runs of images that lie together on a disk or server (the shards of
            `dino.data.sources.shards`), which make up `length`. More than `WINDOW` of them are
            shuffled,
            dealt into equal windows of at most `WINDOW`, and the images are shuffled within each
            window, so that few files are read at a time. Fewer make no difference.
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
    key = np.array([seed % _WORD, stream], dtype=np.uint64)
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
        return (
            float(self.jitter),
            self.brightness,
            self.contrast,
            self.saturation,
            self.hue,
            *map(float, self.order),
            float(self.grey),
            self.sigma,
            self.solarize,
        )


def draw_views(
    specs: Sequence[ViewSpec], height: int, width: int, rng: np.random.Generator
) -> list[ViewParams]:
    """Draw the parameters of every view of an image of `height` x `width` pixels.

    Each view takes the same number of uniform numbers from `rng`, whether it uses them or not:
    first the box (ten tries of area and aspect, then the place), then flip, jitter, order, the
    four factors, grey, blur, sigma, solarise. So views do not disturb one another: view v of an
    image stays what it is when later views are added or probabilities change.

    Returns:
        One `ViewParams` per view, in the order of `expand(specs)`.
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
    """A random box by the law of torchvision's `RandomResizedCrop`.

    The area is uniform in `spec.scale`, the logarithm of the aspect in `spec.ratio`, the place
    uniform. After ten boxes that do not fit, the largest centred one of an allowed aspect is taken.

    Args:
        spec: the kind of view.
        height: of the image in pixels.
        width: of the image in pixels.
        uniform: 22 numbers from [0, 1): area and aspect of each try, then the row, the column.

    Returns:
        Top, left, height and width in pixels.
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
    return _centre_box(spec.ratio, height, width)


def _centre_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


def _factor(strength: float, uniform: float) -> float:
    return _between(max(0.0, 1.0 - strength), 1.0 + strength, uniform)
