"""`dino.data.views.photometric.augment` for CPUs: one pass over the images, compiled by numba.

Each image stays in the cache until it is normalised, and only the operations that change it are
computed; every batched operation of PyTorch moves all pixels through memory (docs/data.md).

The first call compiles for some seconds; numba caches the result beside this file or in the user's
cache folder.

Shapes: N images, C channels, S side, P parameters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from dino.data.views.view_spec import NEVER_SOLARIZE, PHOTOMETRIC

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # as `JITTER_OPERATIONS`
_FIRST = PHOTOMETRIC.index("first")
_FACTOR = PHOTOMETRIC.index("brightness")
_JITTER, _GREY, _SIGMA, _SOLARIZE = (
    PHOTOMETRIC.index(name) for name in ("jitter", "grey", "sigma", "solarize")
)
_f32 = np.float32

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    function = inspect.unwrap(function)  # from the shape checks of `make shapes`
    compiled: _Function
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written: every process compiles
        compiled = njit(**options)(function)
    return compiled


# ---------------------------------------------------------------------------------- colour
@_compiled
def _scale(x: np.ndarray, factor: np.float32, shift: np.float32) -> None:
    for c in range(x.shape[0]):
        channel = x[c]
        for i in range(channel.size):
            channel[i] = min(max(channel[i] * factor + shift, _f32(0)), _f32(255))


@_compiled
def _mean_grey(x: np.ndarray, weights: np.ndarray) -> np.float32:
    mean = _f32(0)
    for c in range(x.shape[0]):
        channel, total = x[c], _f32(0)
        for i in range(channel.size):
            total += channel[i]
        mean += weights[c] * total / _f32(channel.size)
    return mean


@_compiled
def _saturation(x: np.ndarray, factor: np.float32, weights: np.ndarray) -> None:
    """Away from each pixel's grey. RGB only."""
    red, green, blue = x[0], x[1], x[2]
    rest = _f32(1) - factor
    for i in range(red.size):
        grey = (red[i] * weights[0] + green[i] * weights[1] + blue[i] * weights[2]) * rest
        red[i] = min(max(red[i] * factor + grey, _f32(0)), _f32(255))
        green[i] = min(max(green[i] * factor + grey, _f32(0)), _f32(255))
        blue[i] = min(max(blue[i] * factor + grey, _f32(0)), _f32(255))


@_compiled
def _hue(x: np.ndarray, turns: np.float32) -> None:
    """`photometric.shift_hue_`, with the hue h in sixths of a turn. RGB only."""
    red, green, blue = x[0], x[1], x[2]
    shift = _f32(np.trunc(turns * _f32(255))) / _f32(255) * _f32(6)
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        h = (g + b - r - value) / max(chroma, _f32(1e-6)) + _f32(2)
        h = (h if g >= b else -h) + shift + _f32(12)  # positive, whatever the shift
        h -= _f32(6) * np.floor(h * _f32(1 / 6))
        # Distances around the circle to the hues of red (0), green (2) and blue (4).
        d0, d2, d4 = abs(h - _f32(3)), abs(h - _f32(2)), abs(h - _f32(4))
        d0, d2, d4 = _f32(3) - d0, min(d2, _f32(6) - d2), min(d4, _f32(6) - d4)
        red[i] = value - chroma * min(max(d0 - _f32(1), _f32(0)), _f32(1))
        green[i] = value - chroma * min(max(d2 - _f32(1), _f32(0)), _f32(1))
        blue[i] = value - chroma * min(max(d4 - _f32(1), _f32(0)), _f32(1))


# ---------------------------------------------------------------------------------- blur
@_compiled
def _box(lines: np.ndarray, out: np.ndarray, integer: int, fraction: np.float32, step: int) -> None:
    """One pass of a box over values `step` apart: row sums for step 1, sums of rows for step S.

    `lines` starts and ends with integer + 1 repeated borders; slices, since indices that might be
    negative are not vectorised.
    """
    size = out.size
    share = _f32(1) / (_f32(2 * integer + 1) + _f32(2) * fraction)
    edge = fraction * share
    before, after = lines[:size], lines[(2 * integer + 2) * step :][:size]
    if integer == 0:
        centre = lines[step:][:size]
        for i in range(size):
            out[i] = centre[i] * share + edge * (before[i] + after[i])
    elif integer == 1:
        left, centre, right = (
            lines[step:][:size],
            lines[2 * step :][:size],
            lines[3 * step :][:size],
        )
        for i in range(size):
            out[i] = (left[i] + centre[i] + right[i]) * share + edge * (before[i] + after[i])
    else:
        for i in range(size):
            out[i] = edge * (before[i] + after[i])
        for k in range(1, 2 * integer + 2):
            centre = lines[k * step :][:size]
            for i in range(size):
                out[i] += share * centre[i]


@_compiled
def _repeat_borders(lines: np.ndarray, margin: int, step: int) -> None:
    inner = lines.size // step - 2 * margin
    first = lines[margin * step :][:step]
    last = lines[(margin + inner - 1) * step :][:step]
    for k in range(margin):
        above, below = lines[k * step :][:step], lines[(margin + inner + k) * step :][:step]
        for i in range(step):
            above[i], below[i] = first[i], last[i]


@_compiled
def _blur(x: np.ndarray, sigma: float, side: int, one: np.ndarray, two: np.ndarray) -> None:
    """Pillow's `GaussianBlur`: three passes of a box along either axis, borders repeated.

    The box has the radius integer + fraction of `photometric._box_radius`. `one` and `two` are
    buffers for a channel and its borders.
    """
    variance = sigma * sigma / 3.0
    integer = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = _f32(
        (2 * integer + 1)
        * (integer * (integer + 1) - 3 * variance)
        / (6 * (variance - (integer + 1) * (integer + 1)))
    )
    margin = integer + 1
    a, b = one[: (side + 2 * margin) * side], two[: (side + 2 * margin) * side]
    inner_a, inner_b = a[margin * side :][: side * side], b[margin * side :][: side * side]
    row_a = np.empty(side + 2 * margin, np.float32)
    row_b = np.empty(side + 2 * margin, np.float32)
    for c in range(x.shape[0]):
        channel = x[c]
        for y in range(side):
            row_a[margin : margin + side] = channel[y * side :][:side]
            _repeat_borders(row_a, margin, 1)
            _box(row_a, row_b[margin:][:side], integer, fraction, 1)
            _repeat_borders(row_b, margin, 1)
            _box(row_b, row_a[margin:][:side], integer, fraction, 1)
            _repeat_borders(row_a, margin, 1)
            _box(row_a, inner_a[y * side :][:side], integer, fraction, 1)
        _repeat_borders(a, margin, side)
        _box(a, inner_b, integer, fraction, side)
        _repeat_borders(b, margin, side)
        _box(b, inner_a, integer, fraction, side)
        _repeat_borders(a, margin, side)
        _box(a, channel, integer, fraction, side)


# ---------------------------------------------------------------------------------- everything
@_compiled
def augment_into(
    images: np.ndarray,
    params: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    result: np.ndarray,
) -> None:
    """Fill `result` with `dino.data.views.photometric.augment` of the images.

    The images are uint8 [N, C, S, S], all others float32: the parameters [N, P] as `PHOTOMETRIC`
    names them, for each channel the weight in the grey, the factor and the summand of the
    normalization [C], and the result [N, C, S, S]. All are contiguous.
    """
    count, channels, side = images.shape[:3]
    margins = 2 * (math.ceil(params[:, _SIGMA].max()) + 1) if count else 0
    one = np.empty((side + margins) * side, np.float32)
    two = np.empty((side + margins) * side, np.float32)
    for n in range(count):
        source, x = images[n].reshape(channels, -1), result[n].reshape(channels, -1)
        row = params[n]
        for c in range(channels):
            levels, channel = source[c], x[c]
            for i in range(channel.size):
                channel[i] = _f32(levels[i])
        if row[_JITTER] > 0:
            for place in range(4):
                operation = int(row[_FIRST + place])
                factor = row[_FACTOR + operation]
                if operation == _BRIGHTNESS:
                    _scale(x, factor, _f32(0))
                elif operation == _CONTRAST:
                    _scale(x, factor, _mean_grey(x, weights) * (_f32(1) - factor))
                elif channels == 3 and operation == _SATURATION:
                    _saturation(x, factor, weights)
                elif channels == 3 and operation == _HUE:
                    _hue(x, factor)
        if channels == 3 and row[_GREY] > 0:
            _saturation(x, _f32(0), weights)
        if row[_SIGMA] > 0:
            _blur(x, row[_SIGMA], side, one, two)
        threshold = row[_SOLARIZE] - _f32(0.5)
        solarize = row[_SOLARIZE] < NEVER_SOLARIZE
        for c in range(channels):
            channel = x[c]
            if solarize:
                for i in range(channel.size):
                    value = channel[i]
                    channel[i] = _f32(255) - value if value >= threshold else value
            for i in range(channel.size):
                channel[i] = channel[i] * scale[c] + shift[c]
