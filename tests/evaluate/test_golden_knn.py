"""k-NN against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
from golden_set import read, tensors

from dino.evaluate.knn import knn


@pytest.mark.parametrize("tiles", [{}, {"chunk": 7, "tile": 23}])
def test_golden_knn(tiles: dict[str, int]) -> None:
    golden, expected = tensors("knn.safetensors"), read("knn.json")
    scores = knn(
        golden["train_features"],
        golden["train_labels"],
        golden["test_features"],
        golden["test_labels"],
        k=[int(k) for k in expected],
        temperature=0.07,
        **tiles,
    )
    assert {str(k) for k in scores} == expected.keys()
    for k, score in scores.items():
        assert score.top1 == pytest.approx(expected[str(k)]["top1"], rel=1e-9)
        assert score.top5 == pytest.approx(expected[str(k)]["top5"], rel=1e-9)
