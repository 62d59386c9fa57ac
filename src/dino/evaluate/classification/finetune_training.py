"""Fine-tuning: the network with its classifier, the optimizer, the loop.

Shapes: B images, C classes, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.data.sources.open import Source
from dino.data.views.random_streams import generator
from dino.evaluate.classification.deit_augmentation import AugmentedBatches, Recipe
from dino.evaluate.classification.knn_classifier import Accuracy
from dino.evaluate.classification.linear_classifier import hits
from dino.evaluate.epoch_checkpoint import EpochCheckpoint
from dino.features.extractor import FeatureExtractor
from dino.features.table import my_share
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import (
    Precision,
    all_sum,
    autocast,
    data_parallel,
    gather_objects,
    memory_errors,
    ranks,
)

UNDECAYED = ("cls_token", "register_tokens", "pos_embed")


class FineTunedNetwork(nn.Module):
    """A network and a new linear classifier on its feature."""

    def __init__(self, backbone: Backbone, classes: int, scale: float, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        random = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=random)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(scale)
        self.head.to(next(backbone.parameters()).device)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        drop_path_scale: Float[Tensor, "branches B"] | None = None,
    ) -> Float[Tensor, "B C"]:
        """The logits of the classes."""
        return self.head(self.backbone(images, drop_path_scale))


def parameter_groups(model: FineTunedNetwork, recipe: Recipe) -> list[dict[str, Any]]:
    """One group for each depth, with or without weight decay, and its learning rate factor.

    As in DeiT, parameters with one axis, tokens and the position embedding are not decayed.
    With a layer decay d the factor of patch and position embedding is d ** (depth + 1), of block i
    d ** (depth - i), of the final norm and the classifier 1.

    Raises:
        UserError: for a layer decay on a network without blocks.
    """
    backbone = model.backbone
    if recipe.layer_decay != 1 and not backbone.depth:
        raise UserError("a layer decay needs a ViT of dino: leave --layer-decay at 1")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(UNDECAYED)
        _, of_backbone, inner = name.partition("backbone.")
        above = backbone.depth + 1 - backbone.layer_index(inner) if of_backbone else 0
        decay, scale = recipe.weight_decay if decayed else 0.0, recipe.layer_decay**above
        group = {"params": [], "weight_decay": decay, "scale": scale}
        groups.setdefault((above, decayed), group)["params"].append(parameter)
    return list(groups.values())


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The rate of an epoch: a linear warm-up, then a cosine over all epochs, as timm's.

    `lr` is scaled by batch / 512 as in DeiT, `lr_start` and `lr_end` are not.
    """
    full = recipe.lr * recipe.batch / 512
    if epoch < recipe.warmup:
        return recipe.lr_start + (full - recipe.lr_start) * epoch / recipe.warmup
    cosine = (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    return recipe.lr_end + (full - recipe.lr_end) * cosine


def drop_path_scales(
    backbone: Backbone, recipe: Recipe, seed: int, epoch: int, step: int
) -> Float[Tensor, "branches B"] | None:
    """Drop path's factors of this rank's share of the batch: 0, or 1 / (1 - rate).

    They depend on (seed, epoch, step) and an image's position in the batch, not on the ranks.
    """
    branches = backbone.residual_branches
    if not branches or not recipe.drop_path:
        return None
    rates = torch.linspace(0, recipe.drop_path, branches // 2).repeat_interleave(2)[:, None]
    rng = generator(seed, recipe.repeats * recipe.epochs + epoch, step)
    draws = torch.from_numpy(rng.random((branches, recipe.batch)))
    factors = ((draws >= rates) / (1 - rates))[:, list(my_share(range(recipe.batch)))]
    return factors.to(next(backbone.parameters()).device, torch.float32, non_blocking=True)


class Epoch(NamedTuple):
    """The mean loss of an epoch over steps and ranks, and the accuracy on the test images."""

    loss: float
    accuracy: Accuracy


def tune(
    model: FineTunedNetwork,
    batches: AugmentedBatches,
    evaluate: Callable[[], Accuracy],
    checkpoint: EpochCheckpoint,
    precision: Precision = "fp32",
) -> list[Epoch]:
    """Train every parameter of `model`; the loss and the accuracy of each epoch.

    Raises:
        UserError: if the loss is no longer finite.
    """
    recipe, device = batches.recipe, model.head.weight.device
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=0.0)
    state, before = checkpoint.read()
    if before:
        _restore(model, optimizer, state)
    history = [Epoch(loss, Accuracy(*row)) for loss, row in before]
    trained = data_parallel(model, device)
    for epoch in range(len(history), recipe.epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, epoch) * group["scale"]
        losses = []
        title = f"epoch {epoch + 1} of {recipe.epochs}"
        with bar(title, len(batches), shown=ranks().main) as advance:
            for step, (images, targets) in enumerate(batches.epoch(epoch)):
                scales = drop_path_scales(model.backbone, recipe, batches.seed, epoch, step)
                with memory_errors("--batch"):
                    with autocast(device, precision):
                        logits = trained(images, scales)
                    loss = F.cross_entropy(logits.float(), targets)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                advance(1)
        mean = float(all_sum(torch.stack(losses).mean()) / len(gather_objects(None)))
        if not math.isfinite(mean):
            raise UserError(f"the loss was not finite in epoch {epoch + 1}: choose a smaller --lr")
        model.eval()
        history.append(Epoch(mean, evaluate()))
        checkpoint.write(_state(model, optimizer), history)
    model.eval()
    return history


def _state(model: FineTunedNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return tensors


def _restore(
    model: FineTunedNetwork, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = tensor
        else:
            index, _, moment = rest.partition(".")
            moments[int(index)][moment] = tensor
    model.load_state_dict(weights, strict=True)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(moments)})


@torch.inference_mode()
def measure(
    model: FineTunedNetwork,
    val: Source,
    labels: Int[Tensor, " n"],
    batch: int = 64,
    workers: int | None = 0,
    precision: Precision = "fp32",
) -> Accuracy:
    """The accuracy on `val`, each image once over all ranks, through the network's transform."""
    device = model.head.weight.device

    def compute(images: Tensor) -> Tensor:
        with autocast(device, precision):
            return cast(Tensor, model(images.to(device, non_blocking=True)))

    options: dict[str, Any] = {"title": "test images", "memory_option": "--forward-batch"}
    transform = model.backbone.preprocessing
    logits = FeatureExtractor(transform, compute, batch, workers, **options).table(val)
    (correct,) = hits(logits.features[:, None], labels[logits.indices]).tolist()
    top1, top5 = (100 * count / len(logits) for count in correct)
    return Accuracy(top1, top5, len(logits))
