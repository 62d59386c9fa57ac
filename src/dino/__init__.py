"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

    import dino
    dino.pretrain("small_data", data="photos/", out="runs/photos")
    backbone = dino.load("runs/photos")
    backbone(images)                      # [B, 3, H, W] -> [B, D]

Everything heavy is imported when it is called, so that `dino --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from dino.models.backbone import Backbone
    from dino.train.config import PretrainConfig
    from dino.train.loop import Result

__version__ = "0.1.0"
__all__ = ["__version__", "create", "load", "pretrain"]


def create(arch: str = "vit_small", **options: Any) -> Backbone:
    """An untrained network: vit_tiny, vit_small, vit_base, resnet50 or timm:NAME.

    See `dino.models.create.create` for the options.
    """
    from dino.models.create import create

    return create(arch, **options)


def load(weights: str | Path, device: str | torch.device = "cpu", **options: Any) -> Backbone:
    """A trained network in evaluation mode: a run, a file of weights, or a published name.

    See `dino.weights.load.load` for what can be read, and for the options `network`, `position`,
    `channels` and `heads`.
    """
    from dino.weights.load import load

    return load(weights, device, **options)


def pretrain(
    recipe: str | PretrainConfig | None = None,
    *,
    data: Any = "demo",
    out: str | Path,
    val: Any = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
    stats: str | Path | None = None,
    init_from: str | Path | None = None,
    init_head: Literal["auto", "new"] = "auto",
) -> Result:
    """Pretrain on images, as the command `dino pretrain` does; resumes by itself.

    See `dino.pretraining.pretrain`.
    """
    from dino.pretraining import pretrain

    return pretrain(
        recipe,
        data=data,
        out=out,
        val=val,
        device=device,
        settings=settings,
        stats=stats,
        init_from=init_from,
        init_head=init_head,
    )
