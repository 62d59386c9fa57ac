"""Tiles of real photographs that are installed with scikit-image and scikit-learn.

Tiles of the left side of a photograph are the training set, tiles of its right side the test set,
and the photograph is the label: a good network recognises a photograph from the side that was not
in the training set.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.sources.base import Source
from dino.files import UserError

# No drawings, no text, one picture of the stereo pair.
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "clock": "skimage/data/clock_motion.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}

SHORT_SIDE = 300  # of a photograph after resizing; every one is at least that high and wide
TILE = 144  # pixels, the width of a side of a square photograph
SIDE = 0.48  # of the width; the rest between the two sides is the margin
TILES = {"train": 96, "test": 32}  # of each photograph


def photographs() -> dict[str, Image.Image]:
    """Every photograph of the demo, uncropped, as RGB, by its name (the label), in label order.

    Raises:
        UserError: if scikit-image or scikit-learn is not installed or lacks a picture.
    """
    return {name: read_picture(_locate(file)) for name, file in PHOTOGRAPHS.items()}


def _locate(file: str) -> Path:
    package, _, inside = file.partition("/")
    spec = find_spec(package)  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo needs {package}: run pip install 'dino-ssl[demo]'")
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.is_file():
        raise UserError(f"this version of {package} lacks {inside}: install 'dino-ssl[demo]'")
    return path


class DemoPhotographs(Source):
    """The photographs themselves, uncropped.

    Raises:
        UserError: if a photograph cannot be found.
    """

    def __init__(self) -> None:
        self._files = {name: _locate(file) for name, file in PHOTOGRAPHS.items()}

    def __len__(self) -> int:
        return len(self._files)

    def content(self, index: int) -> Path:
        """The photograph's file."""
        return list(self._files.values())[index]

    def path(self, index: int) -> str:
        """Such as "demo/chelsea"."""
        return f"demo/{list(self._files)[index]}"


class DemoTiles(Source):
    """Square tiles of the demo's photographs, `TILE` pixels wide, in memory.

    Each side of a photograph is cut off first and resized separately, so no pixel, not even
    through interpolation, is shared by training and test. The tiles of a side overlap on a regular
    grid; every photograph has the same number.

    Args:
        split: "train" or "test".

    Raises:
        UserError: if `split` is neither, or a photograph cannot be found.
    """

    def __init__(self, split: str = "train") -> None:
        if split not in TILES:
            raise UserError(f"the demo has no split {split!r}: use demo, demo:train or demo:test")
        self.split, self.classes = split, list(PHOTOGRAPHS)
        self._sides = [_side(picture, split) for picture in photographs().values()]
        grids = [_grid(side, TILES[split]) for side in self._sides]
        self._tiles = [(label, *corner) for label, grid in enumerate(grids) for corner in grid]
        self.labels = [label for label, _, _ in self._tiles]

    def __len__(self) -> int:
        return len(self._tiles)

    def content(self, index: int) -> Image.Image:
        """Tile `index`, `TILE` pixels wide."""
        label, top, left = self._tiles[index]
        return self._sides[label].crop((left, top, left + TILE, top + TILE))

    def path(self, index: int) -> str:
        """Photograph, split, and the tile's upper left corner in the resized side."""
        label, top, left = self._tiles[index]
        return f"demo:{list(PHOTOGRAPHS)[label]}/{self.split}/{top},{left}"


def columns(width: int, split: str) -> tuple[int, int]:
    """First and last column (exclusive) that `split` uses of a photograph `width` pixels wide."""
    side = int(width * SIDE)
    return (0, side) if split == "train" else (width - side, width)


def _side(picture: Image.Image, split: str) -> Image.Image:
    first, last = columns(picture.width, split)
    scale = SHORT_SIDE / min(picture.size)
    size = (max(TILE, round((last - first) * scale)), round(picture.height * scale))
    side = picture.crop((first, 0, last, picture.height))
    return side.resize(size, Image.Resampling.BICUBIC)


def _grid(side: Image.Image, count: int) -> list[tuple[int, int]]:
    """Upper left corners of `count` tiles, on the grid with the widest spacing."""
    width, height = (length - TILE for length in side.size)

    def spacing(rows: int) -> float:
        axes = ((height, rows), (width, count // rows))
        return min(length / (number - 1) for length, number in axes if number > 1)

    rows = max((rows for rows in range(1, count + 1) if count % rows == 0), key=spacing)
    tops = torch.linspace(0, height, rows).round().int().tolist()
    lefts = torch.linspace(0, width, count // rows).round().int().tolist()
    return [(top, left) for top in tops for left in lefts]
