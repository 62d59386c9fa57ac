"""Every job on images of five channels, with raw pixels beside the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.cli import main
from dino.data.images.pixel_format import PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.models.create import create
from dino.weights.load import save

CHANNELS = 5

JOBS = {
    "search": "--queries {data} --k 2",
    "duplicates": "--size 16",
    "cluster": "--clusters 2 --repeats 1",
    "map": "",
    "select": "--count 3",
    "anomalies": "--queries {data} --size 24",
    "segment": "--masks {masks} --size 24",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images as arrays, and masks of two of them."""
    root = tmp_path_factory.mktemp("channels")
    generator = np.random.default_rng(0)
    for number in range(16):
        (root / f"data/{number % 2}").mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, 256, (24, 32, CHANNELS), dtype=np.uint8)
        np.save(root / f"data/{number % 2}/{number:02}.npy", values)
    (root / "masks/0").mkdir(parents=True)
    for name in ("00", "02"):
        Image.fromarray(np.tile(np.arange(32) // 16, (24, 1)).astype(np.uint8)).save(
            root / f"masks/0/{name}.png"
        )
    torch.manual_seed(0)
    size = {"embed_dim": 24, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}
    network = create("vit_tiny", **size, channels=CHANNELS)
    mean, std = (0.5,) * CHANNELS, (0.25,) * CHANNELS
    pixels = PixelFormat(CHANNELS)
    network.preprocessing = Preprocessing(16, 16, mean, std, pixels=pixels)
    save(network, root / "W.safetensors")
    return root


@pytest.mark.parametrize("name", list(JOBS))
def test_a_job_takes_any_channels(name: str, folder: Path, tmp_path: Path) -> None:
    weights, data = str(folder / "W.safetensors"), folder / "data"
    words = JOBS[name].format(data=data, masks=folder / "masks").split()
    words += ["--workers", "0"] * (name not in ("anomalies", "segment"))
    words += ["--baseline"] * (name in ("search", "cluster", "map", "select", "anomalies"))
    main([name, weights, str(data), "--out", str(tmp_path / "out"), *words])
    content = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert content["preprocessing"]["pixels"]["channels"] == CHANNELS
    assert ("pixels" in content["networks"]) == ("--baseline" in words)
