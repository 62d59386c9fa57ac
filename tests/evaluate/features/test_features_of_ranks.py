"""Features over two real processes: an odd number of images, the same table on both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino.data.sources.open import open_source
from dino.evaluate.classification.knn import KNNEvaluation
from dino.evaluate.features.extractor import extract
from dino.models.create import create
from dino.runtime import process_group

WORLD = 2


def measure(path: Path) -> None:
    """What every process does; alone, without a launcher's variables, too."""
    torch.manual_seed(0)
    vit = create("vit_tiny", width=12, depth=1, heads=2, patch_size=4, image_size=8)
    items: list[Any] = [(Image.new("RGB", (9, 8), (i, 255 - i, 3 * i)), i % 2) for i in range(7)]
    items[3] = ("no image", 1)
    source = open_source(items)
    with process_group(torch.device("cpu")):
        table = extract(vit, source, batch=2)
        scores = KNNEvaluation(source, k=(3,)).run(vit)
    assert table.labels is not None
    arrays = {"features": table.features.numpy(), "labels": table.labels.numpy()}
    np.savez(path, **arrays, score=scores["k3"])


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{rank}.npz")],
            env={**os.environ, **launcher, "RANK": str(rank)},
        )
        for rank in range(WORLD)
    ]
    measure(tmp_path / "alone.npz")
    assert [process.wait(timeout=120) for process in processes] == [0] * WORLD
    alone = np.load(tmp_path / "alone.npz")
    for rank in range(WORLD):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(found["features"], alone["features"], rtol=1e-5, atol=1e-6)
        assert found["labels"].tolist() == [0, 1, 0, 0, 1, 0]
        assert found["score"] == alone["score"]


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
