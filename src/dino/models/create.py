"""`dino.create`: an untrained network by name."""

from __future__ import annotations

import inspect
from typing import Any

from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.convnet import CONVNEXTS, RESNETS, ConvNeXt, ResNet, Timm
from dino.models.vit import SIZES, ViT


def create(arch: str = "vit_small", **options: Any) -> Backbone:
    """An untrained network.

    Args:
        arch: vit_tiny, vit_small, vit_base, vit_large, vit_giant, resnet10t, resnet18, resnet50,
            convnext_tiny, convnext_small, convnext_base, convnext_large, or timm:NAME.
        **options: `image_size`, `channels` and `preprocessing`; for ViTs also those of `ViT`.

    Raises:
        UserError: for an unknown name or option, listing the known ones.
    """
    if not isinstance(arch, str):
        raise UserError(f"arch must be a name such as vit_small, not {arch!r}")
    spec = {key: value for key, value in options.items() if value is not None}
    network, named = architecture(arch)
    if unknown := sorted(spec.keys() - defaults(arch).keys()):
        known = ", ".join(defaults(arch))
        raise UserError(f"{arch} has no option {', '.join(unknown)}: it takes {known}")
    backbone = network(**{**named, **spec})
    spec.pop("preprocessing", None)
    backbone.spec = {"arch": arch, **spec}
    return backbone


def architecture(arch: str) -> tuple[type[Backbone], dict[str, Any]]:
    """The class of a network, and the arguments in its name; `UserError` for an unknown name."""
    if arch in SIZES:
        return ViT, SIZES[arch]
    if arch in RESNETS:
        return ResNet, {"name": arch}
    if arch in CONVNEXTS:
        return ConvNeXt, CONVNEXTS[arch]
    if arch.startswith("timm:"):
        return Timm, {"name": arch.removeprefix("timm:")}
    known = f"{', '.join((*SIZES, *RESNETS, *CONVNEXTS))}, and timm's networks as timm:{arch}"
    raise UserError(f"unknown architecture {arch!r}: known are {known}")


def defaults(arch: str) -> dict[str, Any]:
    """Every option that `create` takes for an architecture, with its default."""
    network, named = architecture(arch)
    options = {key: value.default for key, value in inspect.signature(network).parameters.items()}
    return {key: named.get(key, value) for key, value in options.items() if key != "name"}
