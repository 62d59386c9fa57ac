"""A set with planted defects, for `dino anomalies`: tiles of a photograph of a texture.

    python benchmarks/planted_defects.py --texture brick --out brick
    dino anomalies W brick/normal --queries brick/test --masks brick/masks --size 256 --out found

The photographs are those of scikit-image, 512 x 512 pixels. The left half gives the normal tiles,
the right half those that are tested: as they are (good), with a patch of yet
another photograph (patch), a thin bright line (scratch), or a blurred spot (blur). The tiles have
128 pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFilter

from dino.data.sources.demo import photographs

TILE = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a set of images with planted defects."""

    texture: Literal["brick", "grass", "gravel"]
    """Which photograph."""
    out: Path
    """Folder of the set."""


def defect(kind: str, tile: Image.Image, other: Image.Image, seed: int) -> tuple[Image.Image, ...]:
    """A tile with a defect, and its mask."""
    generator = np.random.default_rng(seed)
    mask = Image.new("L", tile.size)
    draw = ImageDraw.Draw(mask)
    x, y = generator.integers(24, TILE - 24, 2).tolist()
    if kind == "scratch":
        angle, length = generator.uniform(0, np.pi), 40
        dx, dy = length * np.cos(angle) / 2, length * np.sin(angle) / 2
        draw.line((x - dx, y - dy, x + dx, y + dy), 255, 3)
        changed = Image.new("RGB", tile.size, (235, 235, 235))
    else:
        radius = int(generator.integers(8, 16))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
        changed = other if kind == "patch" else tile.filter(ImageFilter.GaussianBlur(4))
    return Image.composite(changed, tile, mask), mask


def main(settings: Settings) -> None:
    found = photographs()
    picture, other = (found[name].convert("RGB") for name in (settings.texture, "coffee"))
    count: Counter[str] = Counter()

    def save(picture: Image.Image, place: str, name: str) -> None:
        path = settings.out / place / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        count[place] += 1

    for left in range(0, 512, TILE):
        for top in range(0, 512, TILE):
            box, name = (left, top, left + TILE, top + TILE), f"{left}-{top}"
            tile = picture.crop(box)
            save(tile, "normal" if left < 256 else "test/good", name)
            for number, kind in enumerate(("patch", "scratch", "blur") if left >= 256 else ()):
                seed = 1000 * number + left + top // TILE
                changed, mask = defect(kind, tile, other.resize((512, 512)).crop(box), seed)
                save(changed, f"test/{kind}", name)
                save(mask, f"masks/{kind}", f"{name}_mask")
    print(", ".join(f"{number} {place}" for place, number in sorted(count.items())))


if __name__ == "__main__":
    main(tyro.cli(Settings))
