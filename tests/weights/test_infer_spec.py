"""Which network tensors belong to."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from dino.files import UserError
from dino.models.create import create
from dino.weights.infer_spec import spec_of


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_other_resnets_are_refused_by_their_blocks(name: str) -> None:
    with torch.device("meta"):
        network = getattr(models, name)()
    tensors = {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match="its blocks are those of another ResNet: name it"):
        spec_of("resnet", tensors, {})


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("arch", ["resnet10t", "resnet18", "resnet50"])
def test_a_resnet_is_an_assumption_unless_named(arch: str, channels: int) -> None:
    with torch.device("meta"):
        tensors = create(arch, channels=channels).state_dict()
    spec, assumed = spec_of("resnet", tensors, {})
    assert spec == {"arch": arch, **({"channels": 4} if channels == 4 else {})}
    assert "resnetaa50" in " ".join(assumed)
    assert spec_of("resnet", tensors, {"name": arch}) == (spec, [])
