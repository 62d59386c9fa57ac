"""Small networks and runs that several tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dino.data.sources.torch_dataset import TorchDataset
from dino.distillation.loss import LossKind, StudentLoss, num_pairs, prototype_cross_entropy
from dino.distillation.network import Network
from dino.distillation.schedules import Schedules
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering, Targets, targets_for_views
from dino.models.head import Head, Predictor
from dino.models.vit import ViT

PROTOTYPES = 24


def schedules(**changes: Any) -> Schedules:
    values: dict[str, Any] = {
        "total": 40,
        "steps_per_epoch": 4,
        "warmup": 2,
        "lr": 2e-3,
        "lr_end": 1e-5,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "momentum": 0.9,
        "momentum_end": 1.0,
        "temperature_start": 0.04,
        "temperature": 0.07,
        "temperature_epochs": 3,
        "freeze_steps": 0,
    }
    return Schedules(**{**values, **changes})


def network(seed: int = 0, *, dtype: torch.dtype = torch.float64, **head: Any) -> Network:
    torch.manual_seed(seed)
    vit = ViT(patch_size=8, embed_dim=24, depth=2, heads=2, image_size=16)
    options = {"hidden": 32, "bottleneck": 12, **head}
    return Network(vit, Head(24, PROTOTYPES, **options)).to(dtype)


def distillation(
    seed: int = 0,
    *,
    planned: Schedules | None = None,
    dtype: torch.dtype = torch.float64,
    head: dict[str, Any] | None = None,
    koleo: float = 0.0,
    targets: Targets | None = None,
    kind: LossKind = "cross_entropy",
    temperature: float = 0.1,
    predictor: bool = False,
    **options: Any,
) -> Distillation:
    student = network(seed, dtype=dtype, **(head or {}))
    if predictor:
        size, norm = student.head.projection, bool(head and head.get("batch_norm"))
        student.predictor = Predictor(size, 20, batch_norm=norm).to(dtype)
    targets = (Centering(PROTOTYPES) if targets is None else copy.deepcopy(targets)).to(dtype)
    loss = StudentLoss(student, temperature=temperature, kind=kind, koleo=koleo)
    return Distillation(loss, targets, planned or schedules(), **options)


def loss_of_logits(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The loss of all student logits [V, B, K] for targets [A, B, K], without a network."""
    (count, batch, prototypes), views = targets.shape, len(student)
    total = student.new_zeros(())
    for first, last in ((0, count), (count, views)):
        if first < last:
            total = total + prototype_cross_entropy(
                student[first:last],
                torch.eye(prototypes, dtype=student.dtype),
                None,
                *targets_for_views(targets, first),
                temperature,
            )
    return total / (num_pairs(count, views) * batch)


def groups(
    seed: int, batch: int = 4, local: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(2, batch, 3, 16, 16, generator=generator, dtype=dtype)]
    if local:
        views.append(torch.randn(local, batch, 3, 8, 8, generator=generator, dtype=dtype))
    return views


def state(distillation: Distillation) -> dict[str, Tensor]:
    """Everything that evolves, copied."""
    parts = {
        "student": distillation.student.state_dict(),
        "teacher": distillation.teacher.state_dict(),
        "loss": distillation.targets.state_dict(),
    }
    flat = {f"{part}.{k}": v.clone() for part, tensors in parts.items() for k, v in tensors.items()}
    names = {p: n for n, p in distillation.student.named_parameters()}
    for parameter, moments in distillation.optimizer.state.items():
        for key, value in moments.items():
            if value is not None:
                flat[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value).clone()
    return flat


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal keys and values; bit for bit unless a relative tolerance is given."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        if tolerance == 0:
            assert torch.equal(value, other), name
        else:
            scale = max(other.abs().max().item(), 1e-12)
            assert (value - other).abs().max().item() <= tolerance * scale, name


TINY_RUN: dict[str, Any] = {
    "model.embed_dim": 24,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch_size": 8,
    "model.drop_path": 0.2,
    "head.prototypes": 16,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "views.global_size": 16,
    "views.local_size": 8,
    "views.local_count": 2,
    "run.batch": 4,
    "run.duration": "8 steps",
    "optim.warmup": "1 steps",
    "execution.workers": 0,
    "execution.precision": "fp32",
    "execution.checkpoint_every": "3 steps",
    "execution.log_every": "2 steps",
    "execution.knn_every": "4 steps",
}
"""Settings of a run of seconds."""


def images(count: int = 12) -> TorchDataset:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 24, 24)
    return TorchDataset(
        [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(count)]
    )
