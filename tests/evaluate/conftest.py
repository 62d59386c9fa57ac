"""Images of one colour each, and the network that sees just that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fakes import COLORS, MeanColor
from PIL import Image


@pytest.fixture
def mean_color() -> MeanColor:
    return MeanColor()


@pytest.fixture
def color_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of one-coloured images, `count` of each class."""

    def make(name: str, count: int, colors: dict[str, tuple[int, int, int]] = COLORS) -> Path:
        for color, rgb in colors.items():
            folder = tmp_path / name / color
            folder.mkdir(parents=True)
            for index in range(count):
                shade = tuple(min(255, value + 5 * index) for value in rgb)
                Image.new("RGB", (12 + index, 10), shade).save(folder / f"{index}.png")
        return tmp_path / name

    return make
