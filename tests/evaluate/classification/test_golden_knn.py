"""k-NN against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
from helpers.golden_set import read, tensors
from oracle.knn import top5_bounds

from dino.evaluate.classification.knn_classifier import knn

TEMPERATURE = 0.07
STABLE = 16
"""The reference orders classes by `votes.sort`. Among equal votes, in practice classes that none
of the k neighbours belongs to, PyTorch keeps their order in rows of at most 16 numbers; in longer
rows the order is nobody's promise (it changes with the processor), so there top-5 has bounds."""


@pytest.mark.parametrize("tiles", [{}, {"chunk": 7, "tile": 23}])
def test_golden_knn(tiles: dict[str, int]) -> None:
    golden, expected = tensors("knn.safetensors"), read("knn.json")
    bank, bank_labels = golden["train_features"], golden["train_labels"]
    queries, labels = golden["test_features"], golden["test_labels"]
    ks = [int(k) for k in expected]
    scores = knn(bank, bank_labels, queries, labels, ks, TEMPERATURE, **tiles)
    assert {str(k) for k in scores} == expected.keys()
    classes = {*bank_labels.tolist(), *labels.tolist()}
    for k, score in scores.items():
        reference = expected[str(k)]
        assert score.top1 == pytest.approx(reference["top1"], rel=1e-9)
        if len(classes) <= STABLE:
            assert score.top5 == pytest.approx(reference["top5"], rel=1e-9)
            continue
        least, most = top5_bounds(
            bank.numpy(),
            bank_labels.tolist(),
            queries.numpy(),
            labels.tolist(),
            k,
            TEMPERATURE,
        )
        for top5 in (score.top5, reference["top5"]):
            assert least - 1e-9 <= top5 <= most + 1e-9
