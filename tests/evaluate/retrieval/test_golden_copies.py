"""Copy detection against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_set import assert_agree, read, tensors

from dino.evaluate.retrieval.ranking_metrics import average_precision
from dino.features.copy_descriptor import gem
from dino.features.whitening import Whitening


def test_golden_average_precision() -> None:
    for case in read("copy.json"):
        ours = average_precision(case["ranks"], case["positives"])
        assert ours == pytest.approx(case["ap"], rel=1e-9)


def test_golden_gem() -> None:
    golden = tensors("copy.safetensors")
    assert_agree(gem(golden["gem_map"]), golden["gem4"])


def test_golden_whitening() -> None:
    golden = tensors("copy.safetensors")
    ours = Whitening.learn(golden["whiten_fit"])(golden["whiten_input"])
    theirs = golden["whitened_uncentred_second_moment"]
    # The sign of an eigenvector is arbitrary; inner products do not depend on it.
    signs = torch.sign((ours * theirs).sum(dim=0))
    assert_agree(ours * signs, theirs)
    assert_agree(ours @ ours.T, golden["whitened_gram"])
