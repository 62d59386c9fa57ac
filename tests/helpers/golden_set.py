"""The reference's numbers: their folder, their sizes, and what "agrees" means.

`DINO_GOLDEN` names the folder (default `tests/golden`); all sizes and settings come from its
`manifest.json`, so that the tests run unchanged on another set of other sizes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino.models.vit import ViT

FOLDER = Path(os.environ.get("DINO_GOLDEN") or Path(__file__).parents[1] / "golden")


def manifest() -> dict[str, Any]:
    return read("manifest.json")


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / name)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def golden_vit(state: dict[str, Tensor]) -> ViT:
    """The network of these weights, in float64."""
    config = manifest()["config"]
    sizes = {name: config[name] for name in ("patch_size", "depth", "heads", "image_size")}
    network = ViT(**sizes, embed_dim=config["width"], position="reference").double()
    network.load_state_dict(state, strict=True)
    return network


def assert_agree(ours: Tensor, golden: Tensor, relative: float = 1e-9) -> None:
    """Largest difference at most `relative` times the largest golden value; same type and shape."""
    assert ours.dtype == golden.dtype
    assert ours.shape == golden.shape
    difference = (ours.detach() - golden).abs().max().item()
    assert difference <= relative * golden.abs().max().item(), f"differs by {difference:.3g}"
    torch.testing.assert_close(ours.detach(), golden, rtol=1e-6, atol=relative)
