"""Networks against the reference's numbers, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_set import assert_agree, golden_head, golden_vit, manifest, part, tensors
from torch import Tensor

CONFIG = manifest()["config"]
SIZES = [tuple(size) for size in CONFIG["input_sizes"]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return tensors("vit.safetensors")


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_golden_vit_cls_and_gradients(golden: dict[str, Tensor], height: int, width: int) -> None:
    vit, expected = golden_vit(part(golden, "state.")), part(golden, f"{height}x{width}.")
    image = expected["image"].clone().requires_grad_()
    cls = vit(image)
    (cls * expected["probe"]).sum().backward()
    assert_agree(cls, expected["cls"])
    ours = {
        "grad_image": image.grad,
        "grad_pos_embed": vit.pos_embed.grad,
        "grad_last_qkv": vit.blocks[-1].attn.qkv.weight.grad,
        "grad_first_fc1": vit.blocks[0].mlp.fc1.weight.grad,
    }
    for name, gradient in ours.items():
        assert gradient is not None
        assert_agree(gradient, expected[name])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_golden_vit_features(golden: dict[str, Tensor], height: int, width: int) -> None:
    vit, expected = golden_vit(part(golden, "state.")), part(golden, f"{height}x{width}.")
    layers = {int(k.removeprefix("layer")): v for k, v in expected.items() if "layer" in k}
    with torch.inference_mode():
        features = vit.features(expected["image"], last=len(layers), attention=True)
        fused = vit.features(expected["image"], last=len(layers))
    assert features.attention is not None
    assert fused.attention is None
    assert_agree(features.attention, expected["last_attention"])
    for index, tokens in layers.items():
        for ours in (features, fused):
            patches = ours.patches[index].flatten(2).transpose(1, 2)
            assert_agree(torch.cat([ours.cls[index, :, None], patches], 1), tokens)


@pytest.mark.parametrize("variant", ["fixed_norm", "free_norm"])
def test_golden_head(variant: str) -> None:
    golden = part(tensors("head.safetensors"), f"{variant}.")
    head = golden_head(golden, fixed_norm=variant == "fixed_norm")
    x = golden["input"].clone().requires_grad_()
    output = head(x)
    (output * golden["probe"]).sum().backward()
    assert_agree(output, golden["output"])
    assert x.grad is not None
    assert_agree(x.grad, golden["grad_input"])
    gradients = {n: p.grad for n, p in head.named_parameters() if p.grad is not None}
    expected = part(golden, "grad.")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_agree(gradient, expected[name])
