"""Parameter groups, optimizers, clipping and the last-layer freeze, as the published code has them.

Every step is conditional on the device: where `found_inf` is true no parameter, moment or step
count changes, without host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "sgd", "lars"]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trained parameters: decayed; and biases with all other 1-D tensors.

    The CLS token, the position embedding and the prototypes' norms are not 1-D and hence decayed
    (published code utils.py:632-643; DeiT and timm would exempt the first two).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith(".bias") or parameter.ndim == 1
            (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "name": "decayed", "decayed": True},
        {"params": plain, "name": "not decayed", "decayed": False, "weight_decay": 0.0},
    ]


def make_optimizer(name: OptimizerName, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW (betas .9, .999, eps 1e-8), SGD (momentum .9) or LARS over the parameter groups.

    Learning rate and weight decay are set before every step by `set_hyperparameters`.
    """
    groups = parameter_groups(module)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0, fused=True)
        # PyTorch's kernel cannot take a layer that is released later and has no buffer yet.
        for group in groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return LARS(groups)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of the decayed one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` that changes nothing where `found_inf` (0-dim bool) is true."""
    # Attributes of gradient scaling, which PyTorch's fused kernels and LARS read.
    cast(Any, optimizer).found_inf = found_inf.float()
    cast(Any, optimizer).grad_scale = None
    optimizer.step()


def clip_per_tensor(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Scale each gradient to at most the l2 norm `limit`; 0 for no clipping.

    The published code clips every parameter tensor separately, not by the global norm
    (utils.py:132-141).

    Returns:
        0-dim bool tensor: whether any gradient holds NaN or infinity.
    """
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    if limit > 0:
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(gradients), list(factors.unbind()))
    return ~torch.isfinite(norms).all()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD (the paper's ResNet-50), momentum .9, eta .001.

    For tensors that are not 1-D: g += wd p; g *= eta |p| / |g| (factor 1 where a norm is 0).
    Then for all: mu <- momentum mu + g; p <- p - lr mu.
    """

    def __init__(
        self, params: Any, lr: float = 0.0, *, momentum: float = 0.9, eta: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "eta": eta})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    size, slope = parameter.norm(), update.norm()
                    trust = torch.where((size > 0) & (slope > 0), group["eta"] * size / slope, 1.0)
                    update = update * trust
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                momentum = buffer.mul(group["momentum"]).add_(update)
                rate = group["lr"]
                if self.found_inf is not None:
                    momentum = torch.where(self.found_inf.bool(), buffer, momentum)
                    rate = rate * (1 - self.found_inf)
                buffer.copy_(momentum)
                parameter.sub_(rate * momentum)
