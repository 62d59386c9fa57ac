"""Retrieval against the reference's numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.golden_set import assert_agree, golden_vit, part, read, tensors

from dino.evaluate.retrieval.retrieval import PROTOCOLS, SCALES, judge, multiscale
from dino.evaluate.retrieval.revisited import GroundTruth


def test_golden_mean_average_precision() -> None:
    golden = read("retrieval.json")
    truth = [GroundTruth(**judged) for judged in golden["gnd"]]
    ours = judge(np.array(golden["ranks"]).T, truth)
    assert ours.keys() == golden["expected"].keys() == PROTOCOLS.keys()
    for protocol, expected in golden["expected"].items():
        scores = ours[protocol]
        assert scores.map == pytest.approx(expected["map"], rel=1e-9)
        at = expected["mean_precision_at_1_5_10"]
        assert list(scores.at.values()) == pytest.approx(at, rel=1e-9)
        for ap, reference in zip(scores.aps, expected["aps"], strict=True):
            assert ap == (None if reference is None else pytest.approx(reference, rel=1e-9))


def test_golden_multiscale_descriptor() -> None:
    golden = tensors("multiscale.safetensors")
    vit = golden_vit(part(golden, "state."))
    with torch.inference_mode():
        assert_agree(multiscale(vit, golden["image"], SCALES["multi"]), golden["descriptor"])
