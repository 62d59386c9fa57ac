"""`dino.create`: an untrained network by name."""

from __future__ import annotations

from typing import Any

from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.convnet import ResNet50, Timm
from dino.models.vit import SIZES, ViT


def create(arch: str = "vit_small", **options: Any) -> Backbone:
    """An untrained network.

    Args:
        arch: vit_tiny, vit_small, vit_base, resnet50, or timm:NAME.
        **options: `image_size`, `channels` and `preprocessing` for all; for ViTs also
            `patch_size`, `position`, `width`, `depth`, `heads`, `mlp_ratio`, `norm_eps` (see
            `ViT`).

    Raises:
        UserError: for an unknown name or option, listing the known ones.
    """
    if not isinstance(arch, str):
        raise UserError(f"arch must be a name such as vit_small, not {arch!r}")
    spec = {key: value for key, value in options.items() if value is not None}
    try:
        backbone = _build(arch, spec)
    except TypeError as error:
        raise UserError(f"{arch} cannot be built: {error}") from None
    spec.pop("preprocessing", None)
    backbone.spec = {"arch": arch, **spec}
    return backbone


def _build(arch: str, options: dict[str, Any]) -> Backbone:
    if arch in SIZES:
        return ViT(**{**SIZES[arch], **options})
    if arch == "resnet50":
        return ResNet50(**options)
    if arch.startswith("timm:"):
        return Timm(arch.removeprefix("timm:"), **options)
    known = ", ".join([*SIZES, "resnet50", "timm:NAME"])
    raise UserError(f"unknown architecture {arch!r}: known are {known}")
