"""A set with planted defects, for `dino anomalies`: tiles of three photographs of textures.

    python benchmarks/planted_defects.py --out defects
    dino anomalies W defects/normal --queries defects/test --masks defects/masks --out anomalies

The photographs are brick, grass and gravel of scikit-image, 512 x 512 pixels. The left halves give
the normal tiles, the right halves those that are tested: as they are (good), with a patch of yet
another photograph (patch), a thin bright line (scratch), or a blurred spot (blur). The tiles have
128 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFilter

from dino.data.sources.demo import photographs

TILE = 128
TEXTURES = ("brick", "grass", "gravel")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a set of images with planted defects."""

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
    pictures = [found[name].convert("RGB") for name in TEXTURES]
    count = dict.fromkeys(("normal", "test/good", "test/patch", "test/scratch", "test/blur"), 0)

    def save(picture: Image.Image, place: str, name: str) -> None:
        path = settings.out / place / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    for number, (name, picture) in enumerate(zip(TEXTURES, pictures, strict=True)):
        for left in range(0, 512, TILE):
            for top in range(0, 512, TILE):
                box, title = (left, top, left + TILE, top + TILE), f"{name}-{left}-{top}"
                tile = picture.crop(box)
                if left < 256:
                    save(tile, "normal", title)
                    count["normal"] += 1
                    continue
                save(tile, "test/good", title)
                count["test/good"] += 1
                other = found["coffee"].convert("RGB").crop(box)
                for offset, kind in enumerate(("patch", "scratch", "blur")):
                    seed = 1000 * number + left + top // TILE + 10 * offset
                    changed, mask = defect(kind, tile, other, seed)
                    save(changed, f"test/{kind}", title)
                    save(mask, f"masks/{kind}", f"{title}_mask")
                    count[f"test/{kind}"] += 1
    print(", ".join(f"{number} {place}" for place, number in count.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
