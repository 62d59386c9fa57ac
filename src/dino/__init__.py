"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

    import dino
    dino.pretrain("small_data", data="photos/", out="runs/photos")
    backbone = dino.load("runs/photos")
    backbone(images)                      # [B, 3, H, W] -> [B, D]

The functions are imported at their first use (PEP 562), so that `dino --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.models.create import create
    from dino.pretraining import pretrain
    from dino.show.explorer.page import explore
    from dino.weights.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "create", "explore", "load", "pretrain"]

_MODULES = {
    "create": "models.create",
    "explore": "show.explorer.page",
    "load": "weights.load",
    "pretrain": "pretraining",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dino' has no attribute {name!r}")
    from importlib import import_module

    function = globals()[name] = getattr(import_module(f"dino.{_MODULES[name]}"), name)
    return function


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
