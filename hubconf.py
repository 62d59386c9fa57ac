"""Entry points for `torch.hub.load`, under the names that the published code has them.

    backbone = torch.hub.load(REPOSITORY, "dino_vits16")      # REPOSITORY: this one, or its folder
    backbone = torch.hub.load(REPOSITORY, "dinov2_vitb14_reg")
    backbone(images)                                          # [B, 3, H, W] -> [B, D]

Each takes `pretrained=False` for fresh weights, and the options of `dino.load`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

dependencies = ["jaxtyping", "numpy", "PIL", "rich", "safetensors", "torch", "torchvision"]

if importlib.util.find_spec("dino") is None:  # not installed: torch.hub has only fetched the files
    sys.path.append(str(Path(__file__).parent / "src"))

from dino.weights.published import CATALOGUE, Published  # noqa: E402

METHODS = {"dino": "DINO", "dinov2": "DINOv2", "dinov3": "DINOv3"}


def _entry(published: Published) -> Callable[..., Any]:
    def entry(pretrained: bool = True, **options: Any) -> Any:
        import dino

        if pretrained:
            return dino.load(published.name, **options)
        return dino.create(**{**published.spec, **options}).eval()

    accuracy = "" if published.knn is None else f", k-NN {published.knn} % on ImageNet"
    entry.__doc__ = (
        f"{published.architecture}, trained with {METHODS[published.collection]}{accuracy}. "
        f"{published.note}"
    ).strip()
    entry.__name__ = published.name
    return entry


globals().update(
    {
        name: _entry(published)
        for name, published in CATALOGUE.items()
        if published.kind == "backbone"
    }
)
