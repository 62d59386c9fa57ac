"""Small pictures of coloured squares with their masks, in both layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.videos import picture, save_mask


def scene(seed: int) -> np.ndarray:
    """A mask of 24 x 32 pixels with squares of 8 pixels of classes 1 and 2, on complete patches."""
    random = np.random.default_rng(seed)
    ids = np.zeros((24, 32), dtype=np.uint8)
    for number in (1, 2):
        y, x = 4 * random.integers(0, 4), 4 * random.integers(0, 6)
        ids[y : y + 8, x : x + 8] = number
    return ids


def write_plain(root: Path, count: int = 6, indexed: bool = True) -> Path:
    for seed in range(count):
        (root / "images").mkdir(parents=True, exist_ok=True)
        picture(scene(seed)).save(root / f"images/{seed}.png")
        save_mask(scene(seed), root / f"masks/{seed}.png", indexed)
    return root


def write_voc(root: Path, train: int = 3, val: int = 2) -> Path:
    (root / "JPEGImages").mkdir(parents=True)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for seed in range(train + val):
        ids = scene(seed)
        picture(ids).save(root / f"JPEGImages/{seed}.jpg", quality=95, subsampling=0)
        classes = np.where(ids == 2, 15, ids).astype(np.uint8)
        classes[0] = 255
        save_mask(classes, root / f"SegmentationClass/{seed}.png")
        save_mask(ids, root / f"SegmentationObject/{seed}.png")
    (lists / "train.txt").write_text("".join(f"{seed}\n" for seed in range(train)))
    (lists / "val.txt").write_text("".join(f"{seed}\n" for seed in range(train, train + val)))
    return root
