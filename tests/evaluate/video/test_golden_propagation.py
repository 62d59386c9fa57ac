"""One step of label propagation against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
from helpers.golden_set import assert_agree, tensors

from dino.evaluate.video import propagation
from dino.evaluate.video.propagation import Neighbourhood, directions, propagate, stretched


@pytest.mark.parametrize(("radius", "name"), [(2, "radius2"), (None, "unrestricted")])
@pytest.mark.parametrize("tile", [1, 3, 12])
def test_golden_propagation(
    radius: int | None, name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagation, "TILE", tile)
    golden = tensors("video.safetensors")
    labels = golden["source_labels"]
    target = directions(golden["target_features"].T.unflatten(1, labels.shape[-2:]))
    context = directions(golden["source_features"].unflatten(2, labels.shape[-2:]))
    found = propagate(target, context, labels.permute(0, 2, 3, 1), Neighbourhood(radius=radius))
    assert_agree(found.permute(2, 0, 1)[None], golden[f"propagated_{name}"])


def test_golden_stretching() -> None:
    golden = tensors("video.safetensors")
    assert_agree(stretched(golden["propagated_radius2"][0]), golden["normalised_radius2"])
