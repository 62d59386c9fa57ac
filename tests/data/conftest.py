"""Pictures to test on: real ones, since rounding and clipping depend on what is in them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dino.data.sources.demo import photographs


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Six squares of 96 pixels from photographs, in colour and in grey, and one of plain noise."""
    pictures = photographs()
    squares = [
        pictures[name].resize((384, 384)).crop((140, 100, 236, 196))
        for name in ("astronaut", "coffee", "flower", "ihc", "rocket", "camera")
    ]
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return [*squares, Image.fromarray(noise)]
