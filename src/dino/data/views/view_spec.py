"""The views of an image (DINO, section 3.2): how many, how large, how strongly altered.

`dino.data.views.random_streams.draw_views` turns a `ViewSpec` into plain numbers. The worker uses
the box and the flip (`dino.data.images.decode.crop_resize`), the device the rest, as one row of
floats (`dino.data.views.photometric.augment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Annotated, Any

from dino.files import UserError
from dino.settings import Range, validated

GLOBAL_VIEWS = 2
"""The first views of every image, which the teacher gets; the others are local."""

JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""What the numbers in the columns "first" to "fourth" of `PHOTOMETRIC` stand for."""

PHOTOMETRIC = (
    *("jitter", *JITTER_OPERATIONS, "first", "second", "third", "fourth"),
    *("grey", "sigma", "solarize"),
)
"""Names of the columns of `ViewParams.row()`: P = 12."""

NEVER_SOLARIZE = 256.0
"""A threshold that no pixel value reaches."""

COLOUR_ONLY = ("saturation", "hue", "grey")
"""Fields of `ViewSpec` that mean something for RGB only."""

Side = Annotated[int, Range(low=1, high=10**9)]
Areas = Annotated[tuple[float, float], Range(above=0, high=1)]
Probability = Annotated[float, Range(low=0, high=1)]
Strength = Annotated[float, Range(low=0)]


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """The settings that are equal for all views (published code main_dino.py:419-464)."""

    ratio: Annotated[tuple[float, float], Range(above=0)] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of a crop, from and to; its logarithm is uniform."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of the colour jitter: its four operations in random order."""
    brightness: Strength = 0.4
    """Largest relative change of the brightness; the factor is never below 0."""
    contrast: Strength = 0.4
    """Largest relative change of the contrast."""
    saturation: Strength = 0.2
    """Largest relative change of the saturation."""
    hue: Annotated[float, Range(low=0, high=0.5)] = 0.1
    """Largest turn of the hue, in turns of the colour wheel."""
    grey: Probability = 0.2
    """Probability of removing the colour."""
    blur_sigma: Annotated[tuple[float, float], Range(low=0)] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from and to; the paper's suit 224
    pixels, smaller views need less."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec(Augmentations):
    """One kind of view: how many of them, how large, and how strongly they are altered.

    Raises:
        UserError: if a value lies outside its range, naming it.
    """

    name: str
    """For messages and pictures, such as "global1"."""
    count: Annotated[int, Range(low=0)]
    """Views of this kind made from each image."""
    size: Side
    """Pixels a side of the square view."""
    scale: Areas
    """Share of the image's area that a view covers, from and to."""
    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    solarize: Probability = 0.0
    """Probability of inverting the values from `solarize_threshold` up."""
    solarize_threshold: Annotated[float, Range(low=0, high=255)] = 128.0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        validated(self, f"{self.name}.")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{self.name}.{name} is from {low} to {high}: swap the two")

    def for_channels(self, channels: int) -> ViewSpec:
        """The same kind of view for another number of channels: `COLOUR_ONLY` is 0 but for RGB."""
        off: dict[str, Any] = dict.fromkeys(COLOUR_ONLY, 0.0)
        return self if channels == 3 else replace(self, **off)


@dataclass(frozen=True, kw_only=True)
class ViewSettings(Augmentations):
    """Multi-crop and its augmentations (published code main_dino.py:419-464).

    The two global views differ in blur and solarization.
    """

    global_size: Side = 224
    """Pixels a side of the two global views."""
    global_scale: Areas = (0.25, 1.0)
    """Share of the image's area that a global view covers, from and to."""
    local_count: Annotated[int, Range(low=0)] = 10
    """Local views an image."""
    local_size: Side = 96
    """Pixels a side of a local view."""
    local_scale: Areas = (0.05, 0.25)
    """Share of the image's area that a local view covers, from and to."""
    blur: Annotated[tuple[float, float, float], Range(low=0, high=1)] = (1.0, 0.1, 0.5)
    """Probability of a Gaussian blur for global view 1, global view 2, and each local view."""
    solarize: Annotated[tuple[float, float, float], Range(low=0, high=1)] = (0.0, 0.2, 0.0)
    """Probability of solarizing global view 1, global view 2, and each local view."""

    def specs(self) -> tuple[ViewSpec, ...]:
        """One specification for each kind of view; only the two global ones without local views."""
        large = (1, self.global_size, self.global_scale)
        small = (self.local_count, self.local_size, self.local_scale)
        kinds = zip(("global1", "global2", "local"), (large, large, small), strict=True)
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Augmentations)}
        specs = [
            ViewSpec(
                name=name,
                count=count,
                size=size,
                scale=scale,
                blur=blur,
                solarize=solarize,
                **shared,
            )
            for (name, (count, size, scale)), blur, solarize in zip(
                kinds, self.blur, self.solarize, strict=True
            )
        ]
        return tuple(spec for spec in specs if spec.count)


def expand(specs: Sequence[ViewSpec]) -> list[ViewSpec]:
    """The spec of each view of an image, in the order in which the views are made."""
    return [spec for spec in specs for _ in range(spec.count)]


def view_groups(specs: Sequence[ViewSpec]) -> list[range]:
    """Which views are batched together: the globals first, then each run of views of one size.

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
    starts = [
        view
        for view in range(len(sizes))
        if view in (0, GLOBAL_VIEWS) or (view > GLOBAL_VIEWS and sizes[view] != sizes[view - 1])
    ]
    return [range(*ends) for ends in pairwise([*starts, len(sizes)])]
