"""Objects in the layout of COCO: boxes, masks in run lengths, scores.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from dino.evaluate.segmentation.discovered import Box

CATEGORY = {"id": 1, "name": "object", "supercategory": ""}


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> dict[str, list[int]]:
    """A mask as COCO's uncompressed RLE: columns one after the other, first how many are 0.

    pycocotools reads it as it is (`annToMask`).
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = [0] * bool(flat[0]) + [*changes.tolist(), flat.size]
    return {"size": [*mask.shape], "counts": np.diff([0, *ends]).tolist()}


def annotation(mask: Bool[np.ndarray, "H W"], box: Box, score: float) -> dict[str, Any]:
    """An object without its number and image, which `dataset` adds."""
    return {
        "category_id": CATEGORY["id"],
        "bbox": list(box),
        "area": int(np.count_nonzero(mask)),
        "segmentation": run_lengths(mask),
        "iscrowd": 0,
        "score": round(score, 6),
    }


def dataset(
    objects: Sequence[tuple[str, tuple[int, int], dict[str, Any]]],
    root: str | Path,
    info: dict[str, Any],
) -> dict[str, Any]:
    """The layout of a file of COCO.

    Args:
        objects: path, size (height, width) and annotation of each image.
        root: names of files begin below this folder.
        info: where the objects come from.
    """
    images, annotations = [], []
    for number, (path, (height, width), one) in enumerate(objects, start=1):
        inside = Path(path).is_relative_to(root)
        name = Path(path).relative_to(root).as_posix() if inside else path
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations.append({"id": number, "image_id": number, **one})
    return {
        "info": info,
        "images": images,
        "categories": [CATEGORY],
        "annotations": annotations,
    }
