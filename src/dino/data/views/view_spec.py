"""The views of an image (DINO, section 3.2): how many, how large, how strongly altered.

`dino.data.views.random_streams.draw_views` turns a `ViewSpec` into plain numbers. The worker uses
the box and the flip (`dino.data.images.decode.crop_resize`), the device the rest, as one row of
floats (`dino.data.views.photometric.augment`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dino.files import UserError

GLOBAL_VIEWS = 2
"""The first views of every image, which the teacher gets; the others are local."""

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

NEVER_SOLARIZE = 256.0
"""A threshold that no pixel value reaches."""

COLOUR_ONLY = ("saturation", "hue", "grey")
"""Fields of `ViewSpec` that mean something for RGB only."""


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


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Multi-crop and its augmentations (published code main_dino.py:419-464)."""

    global_size: int = 224
    """Pixels a side of the two global views."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the image's area that a global view covers, from and to."""
    local_count: int = 10
    """Local views an image."""
    local_size: int = 96
    """Pixels a side of a local view."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Share of the image's area that a local view covers, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a crop, from and to."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of the colour jitter."""
    brightness: float = 0.4
    """Largest relative change of the brightness."""
    contrast: float = 0.4
    """Largest relative change of the contrast."""
    saturation: float = 0.2
    """Largest relative change of the saturation."""
    hue: float = 0.1
    """Largest turn of the hue, in turns."""
    grey: float = 0.2
    """Probability of removing the colour."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of a Gaussian blur for global view 1, global view 2, and each local view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from and to; the paper's suit 224
    pixels, smaller views need less."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarizing global view 1, global view 2, and each local view."""

    def specs(self) -> tuple[ViewSpec, ...]:
        """One specification for each kind of view."""
        kinds = dino_views(
            global_size=self.global_size,
            global_scale=self.global_scale,
            local_count=self.local_count,
            local_size=self.local_size,
            local_scale=self.local_scale,
        )
        common = {f.name for f in fields(self)} & {f.name for f in fields(ViewSpec)}
        separate = {"blur", "solarize"}  # one value for each kind
        shared: dict[str, Any] = {name: getattr(self, name) for name in common - separate}
        return tuple(
            replace(kind, **shared, blur=blur, solarize=solarize)
            for kind, blur, solarize in zip(kinds, self.blur, self.solarize, strict=False)
        )
