"""Image files as tests read them: levels, values, and why they do not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino.data.images.decode import as_pixels, open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat


def levels(file: Path | io.BytesIO, *channels: Any, **options: Any) -> np.ndarray:
    """The file's levels [C, H, W]."""
    return as_pixels(read_image(file, pixels=PixelFormat(*channels, **options))).numpy()


def stored_values(file: Path | io.BytesIO, pixels: PixelFormat = RGB) -> np.ndarray:
    """The file's values as they are stored."""
    with open_image(file, pixels=pixels) as image:
        return image.values()


def misfit(file: Path | io.BytesIO, *channels: Any, **options: Any) -> str:
    """The sentence that refuses a file."""
    with pytest.raises(ImageError) as caught:
        levels(file, *channels, **options)
    assert caught.value.defect == "misfit"
    assert "\n" not in str(caught.value)
    return str(caught.value)
