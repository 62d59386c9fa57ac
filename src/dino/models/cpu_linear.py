"""Linear layers that are faster on a CPU: the product of many rows by oneDNN's convolution.

On a CPU with several threads `F.linear` in fp32 copies the bias into the result, multiplies with
MKL and adds. A 1x1 convolution over channels-last rows is the same sum of products, adds the bias
in the same pass, and balances the threads better. `dino.runtime.ONEDNN_LINEAR` is the switch, with
the gain; `benchmarks/linear.py` measures single layers. Elsewhere the layer is `nn.Linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino import runtime

ENOUGH_ROWS = 512
"""From here on the convolution is at least as fast (128 to 1536 columns, 2 threads)."""


class Linear(nn.Linear):
    """`nn.Linear`, the same function and parameters."""

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Input @ weight.T + bias."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Tensor | None
) -> Float[Tensor, "*rows out"]:
    """`F.linear`, by oneDNN's convolution where that is faster."""
    if not _convolution_is_faster(x, weight):
        return F.linear(x, weight, bias)
    return _Product.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _convolution_is_faster(x: Tensor, weight: Tensor) -> bool:
    # First, so that a compiled, exported or traced graph gets no condition on its number of rows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return (
        runtime.ONEDNN_LINEAR
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= ENOUGH_ROWS * x.shape[-1]
        and torch.get_num_threads() > 1  # with one, PyTorch uses slower code
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class _Product(torch.autograd.Function):
    """The product in the form that `torch.func` requires; it is twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _convolve(grad, weight.t().contiguous(), None) if need_x else None,
            grad.t() @ x if need_weight else None,  # MKL is as fast here
            grad.sum(dim=0) if need_bias else None,
        )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X @ weight.T + bias, the rows as pixels of one image in a column."""
    pixels = x.contiguous()[None, :, None].permute(0, 3, 1, 2)  # [1, in, rows, 1]
    product = F.conv2d(pixels, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).flatten(0, 2)
