"""Arrays in `.npy` files.

Shapes: C channels, H height and W width.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped

from dino.data.images.pixel_format import (
    PixelFormat,
    Stream,
    channels_first,
    check_kind,
    check_size,
)


def read_npy(file: Stream, name: str, expected: PixelFormat) -> Shaped[np.ndarray, "C H W"]:
    """A `.npy` array [H, W], [H, W, C] or, if the last axis is not C and the first is, [C, H, W].

    Raises:
        ImageError: if it is another array, or objects, which only a pickle could restore.
        ValueError: if the file is damaged.
    """
    headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    version, _ = np.lib.format.read_magic(file)
    if version not in headers:
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = headers[version](file)
    check_kind(name, dtype)
    check_size(name, math.prod(shape), dtype.itemsize)
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    content = file.read(math.prod(shape) * dtype.itemsize + 1)
    flat = np.frombuffer(content, dtype)  # raises ValueError for an incomplete value
    values = flat.reshape(shape, order="F" if fortran else "C")
    return channels_first(values.astype(dtype.newbyteorder("="), copy=False), name, expected)
