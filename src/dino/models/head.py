"""The projection head `h` (paper section 3.1 and appendix C): an MLP, an l2 bottleneck, prototypes.

Shapes: B rows, D embed_dim of the backbone, K prototypes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.files import UserError
from dino.models.vit import init_linear

Activation = Literal["gelu", "relu"]


class Prototypes(nn.Module):
    """K directions; the logit of each is a dot product, without bias.

    With weight norm, row k is `weight_g[k] * weight_v[k] / |weight_v[k]|`. With a fixed norm
    `weight_g` is 1 and logits are cosines; else it is trained (the paper's ViT-S recipes).
    """

    def __init__(self, dim: int, count: int, *, weight_norm: bool, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        norms = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_norm)
        self.weight_g = norms if weight_norm else None
        # PyTorch's default, as in the published code, which creates them after its init of the MLP.
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)

    def forward(self, z: Float[Tensor, "B bottleneck"]) -> Float[Tensor, "B K"]:
        """Logits of every prototype."""
        logits = F.linear(z, self.weight_v)
        if self.weight_g is None:
            return logits
        return logits * (self.weight_g.squeeze(1) / self.weight_v.norm(dim=1))


class Head(nn.Module):
    """MLP of `layers` Linear layers to the l2-normalised bottleneck, then the prototypes.

    Args:
        embed_dim: D of the backbone.
        prototypes: K.
        hidden: size of the MLP's hidden layers.
        bottleneck: size of the l2-normalised layer before the prototypes; None for `layers` plain
            Linear layers in total, no l2 norm and no weight norm (appendix C).
        layers: Linear layers of the MLP; the paper's "4 linear layers" are 3 and the prototypes.
        batch_norm: batch norm after each hidden Linear (the paper's ResNet-50; no ViT).
        fixed_norm: keep the prototypes' norm at 1 (`norm_last_layer` of the published code).
        activation: exact GELU, or ReLU (appendix C).

    Raises:
        UserError: for sizes that are not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        prototypes: int = 65536,
        *,
        hidden: int = 2048,
        bottleneck: int | None = 256,
        layers: int = 3,
        batch_norm: bool = False,
        fixed_norm: bool = True,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        if min(prototypes, hidden, layers, 1 if bottleneck is None else bottleneck) < 1:
            raise UserError("the head's prototypes, hidden, bottleneck and layers must be positive")
        self.bottleneck = bottleneck
        sizes = [embed_dim, *[hidden] * (layers - 1)]
        if bottleneck is not None:
            sizes.append(bottleneck)
        stack: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            linear = nn.Linear(inputs, outputs)
            init_linear(linear)
            stack.append(linear)
            if bottleneck is None or index < layers - 1:
                stack += [nn.BatchNorm1d(outputs)] * batch_norm
                stack.append(nn.GELU() if activation == "gelu" else nn.ReLU())
        self.mlp = nn.Sequential(*stack)
        self.last_layer = Prototypes(
            sizes[-1], prototypes, weight_norm=bottleneck is not None, fixed_norm=fixed_norm
        )

    @property
    def projection(self) -> int:
        """Size of the projection, which a predictor maps: the bottleneck's or, without one, K."""
        return self.bottleneck or len(self.last_layer.weight_v)

    def embed(
        self, x: Float[Tensor, "B D"], predictor: nn.Module | None = None
    ) -> Float[Tensor, "B bottleneck"]:
        """The input of the prototypes: on the unit sphere, if there is a bottleneck.

        `predictor` maps the bottleneck before the normalisation; without one it is not used.
        """
        z: Tensor = self.mlp(x)
        if self.bottleneck is None:
            return z
        return F.normalize(z if predictor is None else predictor(z), dim=1)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of every prototype."""
        return self.last_layer(self.embed(x))


class Predictor(nn.Sequential):
    """BYOL's predictor, which only the student has: Linear, [batch norm], ReLU, Linear.

    The paper's section 5.1 does not specify it; this is arXiv 2006.07733's, for the projection.
    """

    def __init__(self, size: int, hidden: int, *, batch_norm: bool) -> None:
        first, last = nn.Linear(size, hidden), nn.Linear(hidden, size)
        for layer in (first, last):
            init_linear(layer)
        super().__init__(first, *[nn.BatchNorm1d(hidden)] * batch_norm, nn.ReLU(), last)
