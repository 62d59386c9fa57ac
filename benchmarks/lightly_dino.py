"""A peer: DINO of lightly (`pip install lightly`), trained as its documentation and benchmarks do.

Its transform, head, loss and EMA in a plain loop. For convnets its Imagenette benchmark: batch norm
in the head, SGD with 6e-2 for 256 images, weight decay 5e-4, cosine an epoch, EMA momentum .99. For
ViTs, which that benchmark lacks, the optimizer of the paper: AdamW with 5e-4 for 256 images, weight
decay .04, a tenth of warm-up, EMA momentum .996 to 1. K is 2048, the teacher temperature .04.
"""

from __future__ import annotations

import copy
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino.data.images.decode import as_picture
from dino.data.sources.open import Source
from dino.files import replacing
from dino.models.backbone import Backbone, has_batch_norm

PROTOTYPES = 2048


class Views(Dataset[Any]):
    """Each image through `DINOTransform`."""

    def __init__(self, source: Source, global_size: int, local_size: int) -> None:
        from lightly.transforms import DINOTransform

        self.source = source
        self.transform = DINOTransform(
            global_crop_size=global_size, local_crop_size=local_size, cj_strength=0.5
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(as_picture(self.source[index]))


class LightlyDINO:
    """Student, teacher, loss and optimizer.

    Args:
        backbone: trained in place.
        epochs: of the entire schedule.
        batch: images a step.
    """

    def __init__(self, backbone: Backbone, epochs: int, batch: int, device: torch.device) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        self.convnet = has_batch_norm(backbone)
        self.epochs, self.batch, self.device = epochs, batch, device

        def head() -> nn.Module:  # the teacher's has weights of its own at first, as there
            sizes = (backbone.embed_dim, 2048, 256, PROTOTYPES)
            freeze = -1 if self.convnet else 1
            return DINOProjectionHead(*sizes, batch_norm=self.convnet, freeze_last_layer=freeze)

        self.student = nn.ModuleList([backbone, head()]).to(device).train()
        self.teacher = nn.ModuleList([copy.deepcopy(backbone), head()]).to(device).train()
        self.teacher.requires_grad_(False)
        self.loss = DINOLoss(output_dim=PROTOTYPES).to(device)
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        if self.convnet:
            self.lr = 6e-2 * batch / 256
            options = {"lr": self.lr, "momentum": 0.9, "weight_decay": 5e-4}
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, **options)
        else:
            self.lr = 5e-4 * batch / 256
            self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.04)
        self.epoch = 0

    def train_epoch(self, views: Views, workers: int, steps: int | None = None) -> list[float]:
        """The next epoch, or only so many of its steps; returns the time at the end of each."""
        times = []
        options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
        batches = DataLoader(
            views,
            self.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(self.epoch),
            **options,
        )
        for index, batch in enumerate(islice(batches, steps)):
            self._step([view.to(self.device) for view in batch], self.epoch + index / len(batches))
            times.append(time.perf_counter())
        self.epoch += 1
        return times

    def _step(self, views: list[Tensor], epoch: float) -> None:
        from lightly.models.utils import update_momentum

        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(epoch)
        momentum = 0.99 if self.convnet else 1 - 0.004 * _cosine(epoch / self.epochs)
        for student, teacher in zip(self.student, self.teacher, strict=True):
            update_momentum(student, teacher, m=momentum)
        with torch.no_grad():
            teacher_out = [self._forward(self.teacher, view) for view in views[:2]]
        student_out = [self._forward(self.student, view) for view in views]
        self.optimizer.zero_grad()
        self.loss(teacher_out, student_out, epoch=self.epoch).backward()
        self.student[1].cancel_last_layer_gradients(self.epoch)
        if not self.convnet:
            nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()

    def _lr(self, epoch: float) -> float:
        if self.convnet:  # the benchmark's scheduler changes it once an epoch
            return self.lr * _cosine(math.floor(epoch) / self.epochs)
        warmup = 0.1 * self.epochs
        if epoch < warmup:
            return self.lr * epoch / warmup
        return self.lr * _cosine((epoch - warmup) / (self.epochs - warmup))

    @staticmethod
    def _forward(network: nn.ModuleList, view: Tensor) -> Tensor:
        backbone, head = network
        return head(backbone(view).flatten(1))

    # ------------------------------------------------------------------------------ resuming
    def _parts(self) -> dict[str, Any]:
        names = ("student", "teacher", "loss", "optimizer")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path, **also: Any) -> None:
        """After an epoch, to go on with the next; `restore` returns `also`."""
        content = {name: part.state_dict() for name, part in self._parts().items()}
        with replacing(path) as temporary:
            torch.save({**content, "epoch": self.epoch, "also": also}, temporary)

    def restore(self, path: Path) -> dict[str, Any]:
        content = torch.load(path, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self.epoch = content["epoch"]
        return content["also"]


def _cosine(share: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))
