"""Linear classifiers on frozen features: a sweep of learning rates, and their files.

Shapes: R learning rates, B batch, N numbers a feature, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError, replacing
from dino.weights.files import read_safetensors
from dino.weights.load import read_linear

MOMENTUM = 0.9
STD = 0.01
"""Of the normal distribution that the weights start from; biases start at 0."""


class Sweep:
    """Linear classifiers side by side, one for each learning rate, on the same batches.

    Each is trained independently by SGD with momentum .9 and without weight decay; all start from
    the same weights, drawn by `seed`. One matrix product serves all of them, and one that diverges
    does not affect the others. `inputs` is N, `classes` C.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        rates: Sequence[float],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        start = STD * torch.randn(classes, inputs, generator=torch.Generator().manual_seed(seed))
        self.rates = torch.tensor(rates, dtype=dtype, device=device)
        self.weight = start.to(device, dtype).repeat(len(rates), 1, 1)  # [R, C, N]
        self.bias = self.weight.new_zeros(len(rates), classes)
        self._momenta = (torch.zeros_like(self.weight), torch.zeros_like(self.bias))

    def logits(self, features: Float[Tensor, "B N"]) -> Float[Tensor, "B R C"]:
        """The logits of every classifier."""
        logits = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)
        return logits.unflatten(1, self.bias.shape)

    def step(
        self, features: Float[Tensor, "B N"], labels: Int[Tensor, " B"], factor: float = 1.0
    ) -> None:
        """One step of SGD on the mean cross-entropy of a batch, at `factor` times the rates."""
        gradient = self.logits(features).softmax(dim=2)
        gradient -= F.one_hot(labels, self.bias.shape[1])[:, None]
        gradient = gradient.flatten(1) / len(features)  # of the logits, [B, R * C]
        weight, bias = self._momenta
        weight.flatten(0, 1).mul_(MOMENTUM).addmm_(gradient.T, features)
        bias.flatten().mul_(MOMENTUM).add_(gradient.sum(dim=0))
        self.weight -= (factor * self.rates)[:, None, None] * weight
        self.bias -= (factor * self.rates)[:, None] * bias

    def state(self) -> dict[str, Tensor]:
        """All tensors that training changes."""
        tensors = (self.weight, self.bias, *self._momenta)
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return dict(zip(names, tensors, strict=True))

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state()`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def cosine(epoch: int, epochs: int) -> float:
    """The factor of the learning rate in an epoch, from 1 towards 0; the same for all its steps."""
    return 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def hits(logits: Float[Tensor, "B R C"], labels: Int[Tensor, " B"]) -> Int[Tensor, "R 2"]:
    """How many images have their class first, and among the first min(5, C).

    Equal logits count against the image, and so do those that are not finite: neither a constant
    nor a diverged classifier is right by accident. A label beyond the classes is always wrong.
    """
    classes = logits.shape[2]
    known = labels < classes
    index = labels.where(known, 0)[:, None, None].expand(-1, logits.shape[1], 1)
    true_logits = logits.gather(2, index)
    beaten = (true_logits > logits).sum(dim=2).where(known[:, None], -1)  # [B, R]
    rank = classes - 1 - beaten
    return torch.stack([(rank < 1).sum(dim=0), (rank < min(5, classes)).sum(dim=0)], dim=1)


# ---------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class Classifier:
    """A trained linear layer and the features it takes.

    Attributes:
        weight: of the layer.
        bias: of the layer.
        classes: their names; None where only their indices are known.
        about: the features it takes (`blocks`, `average`), the weights of the network (`sha256`),
            how it was trained; empty for published files.
    """

    weight: Float[Tensor, "C N"]
    bias: Float[Tensor, " C"]
    classes: list[str] | None
    about: dict[str, Any]

    def logits(self, features: Float[Tensor, "B N"]) -> Float[Tensor, "B 1 C"]:
        """The logits, shaped like those of a sweep of one."""
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return F.linear(features, weight, bias)[:, None]


def save(classifier: Classifier, path: str | Path) -> None:
    """Write a classifier (safetensors), atomically."""
    about = json.dumps({"classes": classifier.classes, **classifier.about})
    tensors = {"weight": classifier.weight, "bias": classifier.bias}
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"dino-linear": about},
        )


def load(path: str | Path, *, average: bool) -> Classifier:
    """A classifier that `save` wrote, or a published file of linear weights.

    The published layers for the CLS token and the average patch token take them interleaved (cls_0,
    avg_0, cls_1, avg_1, ...); their columns are reordered: all of the CLS token, then
    all of the average.

    A file that does not end in .safetensors is a published one; `average` says whether it takes the
    average of the patch tokens beside the CLS token.

    Raises:
        UserError: if the file does not exist or is neither.
    """
    if Path(path).suffix != ".safetensors":
        weight, bias = read_linear(path)
        if average:
            weight = weight.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
        return Classifier(weight, bias, None, {})
    if not Path(path).exists():
        raise UserError(f"there is no classifier at {path}")
    tensors, metadata = read_safetensors(Path(path))
    if "dino-linear" not in metadata:
        raise UserError(f"{path} is not a classifier of dino evaluate linear")
    about = json.loads(metadata["dino-linear"])
    return Classifier(tensors["weight"], tensors["bias"], about.pop("classes"), about)
