"""Features over two real processes: an odd number of images, the same table on both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers.ranks import run
from PIL import Image

from dino.data.sources.open import open_source
from dino.evaluate.classification.knn import KNNEvaluation
from dino.features.extractor import extract
from dino.models.create import create
from dino.runtime import Ranks

WORLD = 2


def measure(_: Ranks) -> dict[str, Any]:
    torch.manual_seed(0)
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    items: list[Any] = [(Image.new("RGB", (9, 8), (i, 255 - i, 3 * i)), i % 2) for i in range(7)]
    items[3] = ("no image", 1)
    source = open_source(items)
    table = extract(vit, source, batch=2)
    scores = KNNEvaluation(source, k=(3,)).run(vit)
    assert table.labels is not None
    labels = table.labels.tolist()
    return {"features": table.features.numpy(), "labels": labels, "score": scores["k3"]}


def test_two_processes_give_the_table_of_one() -> None:
    alone = measure(Ranks())
    for found in run(measure, WORLD):
        np.testing.assert_allclose(found["features"], alone["features"], rtol=1e-5, atol=1e-6)
        assert found["labels"] == [0, 1, 0, 0, 1, 0]
        assert found["score"] == alone["score"]
