"""Linear classifiers as the authors published them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dino.files import UserError


def read_linear(path: str | Path) -> tuple[Float[Tensor, "C N"], Float[Tensor, " C"]]:
    """Weight and bias of a published file of linear weights, in the order it holds them.

    Such a file is a pickle of {"state_dict": {"module.linear.weight": ..., "module.linear.bias":
    ...}}, beside other entries; it is read without running anything in it.

    Raises:
        UserError: if there is no such file or it holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no classifier at {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is no file of linear weights ({str(error)[:80]})") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if len(tensors) != 2 or found.keys() != {"weight", "bias"}:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise UserError(f"{path} should hold one linear layer's weight and bias: found {names}")
    return found["weight"].float(), found["bias"].float()
