"""The reference's numbers: their folder, their sizes, and what "agrees" means.

`DINO_GOLDEN` names the folder (default `tests/golden`); all sizes and settings come from its
`manifest.json`, so that the tests run unchanged on another set of other sizes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino.distillation.loss import StudentLoss
from dino.distillation.network import Network
from dino.distillation.schedules import Schedules
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering
from dino.models.head import Head
from dino.models.vit import ViT

FOLDER = Path(os.environ.get("DINO_GOLDEN") or Path(__file__).parents[1] / "golden")


def manifest() -> dict[str, Any]:
    return read("manifest.json")


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / name)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def golden_vit(state: dict[str, Tensor]) -> ViT:
    """The network of these weights, in float64."""
    config = manifest()["config"]
    sizes = {name: config[name] for name in ("patch_size", "depth", "heads", "image_size")}
    network = ViT(**sizes, embed_dim=config["width"], position="reference").double()
    network.load_state_dict(state, strict=True)
    return network


def golden_head(golden: dict[str, Tensor], *, fixed_norm: bool) -> Head:
    """The head of one variant in `head.safetensors`, in float64."""
    config, state = manifest()["config"], part(golden, "state.")
    head = Head(
        golden["input"].shape[1],
        golden["output"].shape[1],
        hidden=config["hidden"],
        bottleneck=config["bottleneck"],
        layers=sum(key.startswith("mlp.") and key.endswith(".weight") for key in state),
        fixed_norm=fixed_norm,
    ).double()
    head.load_state_dict(state, strict=True)
    return head


def golden_centering(center: Tensor) -> Centering:
    momentum = manifest()["training"]["center_momentum"]
    centering = Centering(center.shape[-1], momentum=momentum).double()
    centering.center.copy_(center.squeeze(0))
    return centering


def golden_distillation(
    golden: dict[str, Tensor],
    micro_batch: int | None,
    streamed: bool,
    device: torch.device | None = None,
) -> Distillation:
    """The training of `training.safetensors` before its first step, in float64."""
    config, training = manifest()["config"], manifest()["training"]
    state = part(golden, "init.")
    backbone = ViT(
        patch_size=config["patch_size"],
        embed_dim=config["width"],
        depth=config["depth"],
        heads=config["heads"],
        image_size=config["image_size"],
    )
    head = Head(
        config["width"],
        config["prototypes"],
        hidden=config["hidden"],
        bottleneck=config["bottleneck"],
        layers=sum(bool(re.fullmatch(r"head\.mlp\.\d+\.weight", key)) for key in state),
        fixed_norm=training["norm_last_layer"],
    )
    student = Network(backbone, head).double()
    student.load_state_dict(state, strict=True)
    per_epoch = training["steps_per_epoch"]
    schedules = Schedules(
        total=training["epochs"] * per_epoch,
        steps_per_epoch=per_epoch,
        warmup=training["warmup_epochs"] * per_epoch,
        lr=training["lr_peak"],
        lr_end=training["lr_final"],
        weight_decay=training["weight_decay_start"],
        weight_decay_end=training["weight_decay_end"],
        momentum=training["momentum_start"],
        momentum_end=training["momentum_end"],
        temperature_start=training["teacher_temp_start"],
        temperature=training["teacher_temp_end"],
        temperature_epochs=training["teacher_temp_warmup_epochs"],
        freeze_steps=training["freeze_last_layer_epochs"] * per_epoch,
    )
    return Distillation(
        StudentLoss(student, temperature=training["student_temp"]),
        golden_centering(torch.zeros(1, config["prototypes"])),
        schedules,
        clip=training["clip"],
        drop_path=training["drop_path"],
        micro_batch=micro_batch,
        streamed=streamed,
        device=device,
    )


def golden_steps(golden: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """The views of each step, group by group."""
    for step in range(len(manifest()["training"]["losses"])):
        views = part(golden, f"step{step}.")
        yield [views[k].double() for k in ("global", "local") if k in views]


def assert_agree(ours: Tensor, golden: Tensor, relative: float = 1e-9) -> None:
    """Largest difference at most `relative` times the largest golden value; same type and shape."""
    assert ours.dtype == golden.dtype
    assert ours.shape == golden.shape
    difference = (ours.detach() - golden).abs().max().item()
    assert difference <= relative * golden.abs().max().item(), f"differs by {difference:.3g}"
    torch.testing.assert_close(ours.detach(), golden, rtol=1e-6, atol=relative)
