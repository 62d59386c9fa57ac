"""From a configuration to what is trained."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from dino.data.loader import Batch
from dino.data.views.photometric import augment
from dino.distillation.loss import StudentLoss
from dino.distillation.network import Network
from dino.distillation.schedules import Schedules
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering, KeyQueue, SinkhornKnopp, Targets
from dino.files import UserError
from dino.models.create import create
from dino.models.head import Head, Predictor
from dino.runtime import Ranks, pick_precision, total_memory
from dino.train.config import PixelSettings, PretrainConfig
from dino.train.warm_start import Initial


def build(
    config: PretrainConfig,
    schedules: Schedules,
    device: torch.device,
    ranks: Ranks,
    initial: Initial | None = None,
) -> Distillation:
    """Student, teacher, loss and optimizer of a configuration, drawn from its seed.

    With `initial` the backbone is of its architecture; `Initial.fill` puts the weights in.
    """
    torch.manual_seed(config.run.seed)
    network = _network(config, initial)
    for size in {view.size for view in config.views.specs()}:
        network.backbone.check_size(size)
    return Distillation(
        StudentLoss(
            network,
            temperature=config.teacher.student_temperature,
            kind=config.optim.loss,
            koleo=config.optim.koleo,
        ),
        _targets(config),
        schedules,
        optimizer=config.optim.optimizer,
        clip=config.optim.clip,
        drop_path=config.model.drop_path,
        micro_batch=config.execution.micro_batch,
        seed=config.run.seed,
        device=device,
        precision=pick_precision(config.execution.precision, device),
        ranks=ranks,
    )


def float_views(batch: Batch, pixels: PixelSettings, device: torch.device) -> list[Tensor]:
    """The views of a batch, augmented and normalised on the device, group by group."""
    views = []
    for group in (group.to(device) for group in batch.groups):
        images, params = group.images.flatten(0, 1), group.params.flatten(0, 1)
        flat = augment(images, params, pixels.mean, pixels.std)
        views.append(flat.unflatten(0, group.images.shape[:2]))
    return views


def check_memory(
    config: PretrainConfig, device: torch.device, ranks: Ranks, initial: Initial | None = None
) -> None:
    """Refuse sizes that the memory of the device cannot hold, before any of it is allocated.

    Counted are student, gradients, moments and teacher in fp32, and the views of one step, but no
    activations.

    Raises:
        UserError: with the memory that is needed and that of the device.
    """
    available = total_memory(device)
    if available is None:
        return
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in _network(config, initial).parameters())
    except RuntimeError as error:  # more elements than 64 bits count
        raise UserError(f"no memory holds this model ({error}): lower model.* or head.*") from None
    moments = 2 if config.optim.optimizer == "adamw" else 1
    pixels = sum(spec.count * spec.size**2 for spec in config.views.specs())
    views = config.run.batch // ranks.world * pixels * config.pixels.channels
    needed = 4 * (parameters * (3 + moments) + views)
    if needed > available:
        raise UserError(
            f"the parameters and the views of one step take {needed / 2**30:,.1f} GiB, and "
            f"{device} has {available / 2**30:,.1f} GiB: lower --batch or sizes of model.*, "
            "head.* and views.*"
        )


def _targets(config: PretrainConfig) -> Targets:
    teacher, prototypes = config.teacher, config.head.prototypes
    unit = config.optim.loss != "cross_entropy"
    if config.optim.loss == "contrastive":
        return KeyQueue(config.optim.queue, prototypes)
    if teacher.targets == "centering":
        return Centering(prototypes, momentum=teacher.center_momentum, unit=unit)
    if teacher.targets == "none":
        return Targets(unit=unit)
    return SinkhornKnopp(3 if teacher.targets == "sinkhorn" else 1)


def _network(config: PretrainConfig, initial: Initial | None) -> Network:
    if initial is None:
        options = asdict(config.model)
        del options["drop_path"], options["token_dropout"]
        options |= {"image_size": config.views.global_size, "channels": config.pixels.channels}
        backbone = create(**options)
        backbone.preprocessing = replace(backbone.preprocessing, **config.pixels.transform)
    else:
        backbone = initial.backbone()
    options = asdict(config.head)
    predicts = options.pop("predictor")
    head = Head(backbone.embed_dim, options.pop("prototypes"), **options)
    if not predicts:
        return Network(backbone, head)
    size, norm = head.projection, config.head.batch_norm
    return Network(backbone, head, Predictor(size, config.head.hidden, batch_norm=norm))
