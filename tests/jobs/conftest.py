"""An untrained network that the jobs can use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino.models.create import create
from dino.weights.load import save


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(1)
    vit = create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, image_size=16)
    save(vit, tmp_path / "teacher.safetensors")
    return str(tmp_path / "teacher.safetensors")
