"""What the tests of exports share: weights in a file, a picture, and running the code of a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.models.backbone import Backbone
from dino.weights.export.command import Export, Format, run
from dino.weights.load import save

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32}
ABOUT = {"recipe": "test", "data": "/home/someone/scans/train", "step": 7, "steps": 9}


def backbone(arch: str = "vit_tiny", **options: Any) -> Backbone:
    """A network whose norms and biases are not what a fresh network of any library has."""
    torch.manual_seed(0)
    made = dino.create(arch, **(options or TINY)).eval()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    size = made.spec.get("image_size", 224)
    channels = made.spec.get("channels", 3)
    made.preprocessing = Preprocessing(
        size + 4, size, mean=(0.1, 0.2, 0.3, 0.4)[:channels], std=(0.5, 0.4, 0.3, 0.2)[:channels]
    )
    return made


def export(made: Backbone, folder: Path, format: Format, name: str, **settings: Any) -> Path:
    """Write `made` to a file of ours and export that, as the command does; the export's path."""
    save(made, folder / "weights.safetensors", ABOUT)
    out = folder / name
    settings = {"weights": str(folder / "weights.safetensors"), **settings}
    assert run(Export(format=format, out=out, **settings))[0] == out
    return out


def picture(path: Path, size: tuple[int, int] = (61, 47)) -> Image.Image:
    """A JPEG of smooth random colours at `path`, and the picture in it."""
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return Image.open(path).convert("RGB")


def run_card(card: Path) -> dict[str, Any]:
    """Run the code under "Use" in a card (from the current folder); the names it leaves."""
    code = re.search(r"## Use\n+```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)
    assert code is not None
    names: dict[str, Any] = {}
    with torch.inference_mode():
        exec(code[1], names)
    return names
