"""Pictures of maps."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dino.show.map_overlay import COLORS, colored, overlay


def test_colors_go_from_the_smallest_to_the_largest() -> None:
    values = torch.tensor([[-3.0, 5.0], [1.0, -3.0]])
    found = np.asarray(colored(values, "viridis"))
    first, middle, last = (bytes.fromhex(COLORS["viridis"].split()[i]) for i in (0, 8, 16))
    assert found.shape == (2, 2, 3)
    assert found[0, 0].tolist() == [*first]
    assert found[0, 1].tolist() == [*last]
    assert found[1, 0].tolist() == [*middle]


def test_a_constant_map_is_one_color() -> None:
    found = np.asarray(colored(torch.full((2, 2), 0.3), "viridis"))
    assert (found == found[0, 0]).all()


def test_overlay_blends_by_strength() -> None:
    image = Image.new("RGB", (6, 4), (200, 100, 0))
    values = torch.rand(2, 3)
    heat = colored(values, "inferno").resize((6, 4), Image.Resampling.NEAREST)
    assert overlay(image, values, strength=0.0).tobytes() == image.tobytes()
    assert overlay(image, values, strength=1.0).tobytes() == heat.tobytes()
    assert overlay(image, values).size == image.size
