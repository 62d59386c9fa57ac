"""Pretrain on a custom data set: any object with a length and images by index.

    python examples/own_dataset.py --out runs/shapes --steps 400

This one draws its images; others read a database, a microscope's format or a simulation. Labels are
optional: with `targets` (and `classes`), k-NN accuracy is measured during training.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import dino


class Shapes(Dataset[Image.Image]):
    """Discs, squares and triangles at random places, in random sizes and colours.

    Items can be PIL images, uint8 arrays [H, W, C], uint8 tensors [C, H, W], or tuples that start
    with one of these. Do not apply ToTensor or Normalize: dino does both after its augmentation.
    """

    classes = ("disc", "square", "triangle")

    def __init__(self, count: int) -> None:
        self.targets = [index % len(self.classes) for index in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Image.Image:
        # The same image for the same index in every process: required to resume a run.
        rng = np.random.default_rng(index)
        back, front = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(2))
        picture = Image.new("RGB", (72, 64), back)
        radius = int(rng.integers(12, 25))
        x, y = int(rng.integers(radius, 72 - radius)), int(rng.integers(radius, 64 - radius))
        corners = {"disc": 64, "square": 4, "triangle": 3}[self.classes[self.targets[index]]]
        turn = float(rng.uniform(0, 360))
        ImageDraw.Draw(picture).regular_polygon((x, y, radius), corners, turn, fill=front)
        return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/shapes", help="the run folder")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--set", type=json.loads, default={}, help='such as {"run.batch": 32}')
    given = parser.parse_args()

    settings: dict[str, Any] = {"run.duration": f"{given.steps} steps", **given.set}
    result = dino.pretrain("demo", data=Shapes(given.images), out=given.out, settings=settings)
    print(f"{result.step} steps, k-NN {result.measured or 'not measured'}, {result.run}")

    backbone = dino.load(given.out)
    print(f"the feature of an image: {backbone.embed_dim} numbers")


if __name__ == "__main__":
    main()
