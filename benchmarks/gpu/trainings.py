"""The trainings that `exactness.py` compares, and the largest difference of two of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dino.distillation.loss import StudentLoss
from dino.distillation.network import Network
from dino.distillation.schedules import Schedules
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering
from dino.models.create import create
from dino.models.head import Head

CPU = torch.device("cpu")
DOUBLE, FLOAT = torch.float64, torch.float32


@dataclass(frozen=True)
class Place:
    """Where and in which size the checks run."""

    device: torch.device
    tiny: bool

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


def largest(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two states, relative to the largest value of its tensor, and where.

    Tensors that are 0 but for rounding (gradients of a bias before batch norm) count as a
    thousandth of the largest tensor of their part; parts are named before the first "|".
    """
    if ours.keys() != reference.keys():
        return float("inf"), "other tensors"
    sizes = {name: value.abs().max().item() for name, value in reference.items()}
    found = (0.0, "")
    for name, size in sizes.items():
        of_part = max(s for n, s in sizes.items() if n.split("|")[0] == name.split("|")[0])
        scale = max(size, of_part / 1000, 1e-300)
        difference = (ours[name].cpu() - reference[name]).abs().max().item() / scale
        if not difference <= found[0]:  # also NaN
            found = (difference, name)
    return found


def difference(ours: Tensor, reference: Tensor) -> float:
    return largest({"": ours.detach()}, {"": reference})[0]


def distillation(
    place: Place, arch: str, dtype: torch.dtype, device: torch.device, **options: Any
) -> Distillation:
    """The same student, whatever the device; a ViT with AdamW in float64 and SGD in float32.

    AdamW divides by the size of a gradient, which makes the rounding of gradients that are 0 large.
    """
    torch.manual_seed(0)
    vit = arch.startswith("vit")
    size, heads = place.pick(224, 32), {"heads": 2, "embed_dim": 24, "depth": 2, "patch_size": 8}
    backbone = create(arch, image_size=size, **(heads if place.tiny and vit else {}))
    prototypes, hidden = place.pick((65536, 2048), (64, 32))
    head = Head(backbone.embed_dim, prototypes, hidden=hidden, batch_norm=not vit)
    optimizer = "lars" if not vit else "adamw" if dtype == DOUBLE else "sgd"
    lr = {"lars": 0.3, "adamw": 5e-4, "sgd": 0.1}[optimizer]
    schedules = Schedules(
        total=100,
        steps_per_epoch=10,
        warmup=0,
        lr=lr,
        lr_end=1e-6,
        weight_decay=0.04 if vit else 1e-6,
        weight_decay_end=0.4 if vit else 1e-6,
        momentum=0.99,
        momentum_end=1.0,
        temperature_start=0.04,
        temperature=0.07,
        temperature_epochs=3,
        freeze_steps=1,
    )
    options = {"clip": 3.0 if vit else 0.0, "drop_path": 0.1 if vit else 0.0, **options}
    loss = StudentLoss(Network(backbone, head).to(dtype))
    targets = Centering(prototypes).to(dtype)
    return Distillation(loss, targets, schedules, optimizer=optimizer, device=device, **options)


def views(place: Place, step: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Normalised views: two global and some local."""
    generator = torch.Generator().manual_seed(step)
    batch, large, count, small = place.pick((8, 224, 4, 96), (4, 32, 2, 16))
    shapes = (2, batch, 3, large, large), (count, batch, 3, small, small)
    drawn = [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes]
    return [group.to(dtype).to(device) for group in drawn]


def state(trained: Distillation, losses: list[Tensor]) -> dict[str, Tensor]:
    """Losses, gradients of the last step, student, teacher and center, on the CPU."""
    found = {f"loss|{step}": loss for step, loss in enumerate(losses)}
    gradients = {n: p.grad for n, p in trained.student.named_parameters() if p.grad is not None}
    found |= {f"gradient|{name}": gradient for name, gradient in gradients.items()}
    for name, module in trained.stored().items():  # "loss" is the center
        found |= {f"{name}|{key}": value for key, value in module.state_dict().items()}
    return {n: v.detach().cpu().clone() for n, v in found.items() if v.is_floating_point()}


def train(
    place: Place, trained: Distillation, dtype: torch.dtype, steps: range
) -> dict[str, Tensor]:
    device = trained.device
    losses = [trained.step(views(place, step, dtype, device), step).loss for step in steps]
    return state(trained, losses)


def steps_of(place: Place, arch: str) -> range:
    return range(place.pick(3, 1 if arch == "resnet50" else 2))


@cache
def reference(place: Place, arch: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """On the CPU, all views and images at once."""
    trained = distillation(place, arch, dtype, CPU, streamed=False)
    return train(place, trained, dtype, steps_of(place, arch))
