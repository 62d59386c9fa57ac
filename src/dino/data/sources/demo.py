"""Real photographs that lie on every machine after installation, cut into tiles.

scikit-image and scikit-learn carry some of their example pictures inside their packages; these
files are read directly, nothing is downloaded. Tiles of a photograph's left part are the training
set, tiles of its right part the test set, and the photograph is the label: a good network
recognises a photograph from a part that was not in the training set.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.sources.base import Source
from dino.files import UserError

# Photographs only: no drawings, no text, one picture of the stereo pair.
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
TILE = 144  # as wide as a side of a square photograph
TRAIN_PART, TEST_PART = 0.48, 0.48  # of the width; what is left between them is the margin
TILES = {"train": 96, "test": 32}  # of each photograph


def photographs() -> dict[str, Image.Image]:
    """Every photograph of the demo, uncropped, as RGB, by its name (the label), in label order.

    Raises:
        UserError: if scikit-image or scikit-learn is not installed or lacks a picture.
    """
    return {name: read_picture(_locate(file)) for name, file in PHOTOGRAPHS.items()}


def _locate(file: str) -> Path:
    package, _, inside = file.partition("/")
    found = find_spec(package)  # finds the folder without importing the package
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the demo needs {package}: run pip install 'dino-ssl[demo]'")
    path = Path(found.submodule_search_locations[0], inside)
    if not path.is_file():
        raise UserError(f"this version of {package} lacks {inside}: install 'dino-ssl[demo]'")
    return path


class DemoTiles(Source):
    """Square tiles of the demo's photographs, `TILE` pixels wide, in memory.

    Each side of a photograph is cut off first and resized separately, so no pixel, not even
    through interpolation, is shared by training and test. Within a side the tiles lie on a regular
    grid, as far apart as its shape allows, and overlap; every photograph has the same number.

    Args:
        split: "train" or "test".

    Raises:
        UserError: if `split` is neither, or a photograph cannot be found.
    """

    def __init__(self, split: str = "train") -> None:
        if split not in TILES:
            raise UserError(f"the demo has no split {split!r}: use demo, demo:train or demo:test")
        self.split = split
        pictures = photographs()
        self._sides = [_side(picture, split) for picture in pictures.values()]
        self._places = [_grid(side, TILES[split]) for side in self._sides]
        self._each = TILES[split]
        self.classes = list(pictures)
        self.labels = [index // self._each for index in range(len(self))]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self._sides) * self._each

    def content(self, index: int) -> Image.Image:
        """Tile `index`, `TILE` pixels wide."""
        photograph, tile = divmod(range(len(self))[index], self._each)
        top, left = self._places[photograph][tile]
        return self._sides[photograph].crop((left, top, left + TILE, top + TILE))

    def path(self, index: int) -> str:
        """Photograph, part, and the tile's upper left corner in the resized part."""
        photograph, tile = divmod(range(len(self))[index], self._each)
        top, left = self._places[photograph][tile]
        return f"demo:{list(PHOTOGRAPHS)[photograph]}/{self.split}/{top},{left}"


def columns(width: int, split: str) -> tuple[int, int]:
    """First and last column (exclusive) that `split` may see of a photograph `width` wide."""
    if split == "train":
        return 0, int(width * TRAIN_PART)
    return width - int(width * TEST_PART), width


def _side(picture: Image.Image, split: str) -> Image.Image:
    first, last = columns(picture.width, split)
    scale = SHORT_SIDE / min(picture.size)
    size = (max(TILE, round((last - first) * scale)), round(picture.height * scale))
    box = (first, 0, last, picture.height)
    return picture.crop(box).resize(size, Image.Resampling.BICUBIC)


def _grid(side: Image.Image, count: int) -> list[tuple[int, int]]:
    """Upper left corners of `count` different tiles on a grid that reaches from border to border.

    Of all grids with that many tiles, the one whose nearest neighbours lie farthest apart.
    """
    width, height = (length - TILE for length in side.size)

    def nearest(rows: int) -> float:
        steps = [
            room / (number - 1)
            for room, number in ((height, rows), (width, count // rows))
            if number > 1
        ]
        return min(steps)

    rows = max((rows for rows in range(1, count + 1) if count % rows == 0), key=nearest)
    tops = torch.linspace(0, height, rows).round().int().tolist()
    lefts = torch.linspace(0, width, count // rows).round().int().tolist()
    return [(top, left) for top in tops for left in lefts]
