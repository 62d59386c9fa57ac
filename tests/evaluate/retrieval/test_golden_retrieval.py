"""Retrieval against the reference's numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.golden_set import assert_agree, golden_vit, part, read, tensors

from dino.evaluate.retrieval.retrieval import PROTOCOLS, SCALES, multiscale, scores_by_protocol
from dino.evaluate.retrieval.revisited import GroundTruth


def test_golden_mean_average_precision() -> None:
    golden = read("retrieval.json")
    truth = [GroundTruth(**entry) for entry in golden["gnd"]]
    ours = scores_by_protocol(np.array(golden["ranks"]).T, truth)
    assert ours.keys() == golden["expected"].keys() == PROTOCOLS.keys()
    for protocol, expected in golden["expected"].items():
        scores = ours[protocol]
        assert scores["map"] == pytest.approx(100 * expected["map"], rel=1e-9)
        at = [100 * one for one in expected["mean_precision_at_1_5_10"]]
        assert list(scores["mp"].values()) == pytest.approx(at, rel=1e-9)
        for ap, reference in zip(scores["ap"], expected["aps"], strict=True):
            assert ap == (None if reference is None else pytest.approx(100 * reference, rel=1e-9))


def test_golden_multiscale_descriptor() -> None:
    golden = tensors("multiscale.safetensors")
    vit = golden_vit(part(golden, "state."))
    with torch.inference_mode():
        assert_agree(multiscale(vit, golden["image"], SCALES["multi"]), golden["descriptor"])
