"""What commands that show networks write beside their pictures, and print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.files import replacing
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import describe
from dino.weights.load import fingerprint

PRINTED = 12
"""Most files whose paths are printed one by one."""


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, atomically."""
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays by their names (.npz), atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def print_paths(files: Sequence[str], others: Sequence[Path]) -> None:
    """Print the paths of all files, or how many they are, and the paths of the others."""
    console = Console()
    if len(files) > PRINTED:
        files = [f"{len(files):,} files, which {others[-1].name} lists, such as {files[0]}"]
    for path in (*files, *others):
        console.print(str(path), soft_wrap=True)


def provenance(backbone: Backbone, settings: Any) -> dict[str, Any]:
    """Where pictures come from, as JSON takes it: the network, the settings and the device."""
    origin = {"architecture": backbone.spec, **(backbone.origin or {})}
    return {
        "weights": {"sha256": fingerprint(backbone), **origin},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "device": describe(next(backbone.parameters()).device),
    }
