"""One step of training: Algorithm 1 of the paper with multi-crop, for any number of processes.

Shapes: A teacher views, V views of a group, B images of this rank, K prototypes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dino.distillation.loss import DINOLoss, entropy, match, pairs
from dino.distillation.optimizer import (
    OptimizerName,
    clip_per_tensor,
    drop_gradients,
    make_optimizer,
    refusable_step,
    set_hyperparameters,
)
from dino.distillation.schedules import Schedules
from dino.distillation.teacher import Network, follow, make_teacher
from dino.files import UserError
from dino.models.backbone import has_batch_norm
from dino.runtime import (
    Precision,
    Ranks,
    all_mean,
    all_sum,
    autocast,
    data_parallel,
    no_sync,
    synchronize_batch_norm,
)


@dataclass(frozen=True)
class StepReport:
    """What one step measured, over all ranks; tensors stay on the device until somebody looks.

    Attributes:
        loss: the cross-entropy, mean over pairs and images, in nats.
        teacher_entropy: h(P_t), mean over the teacher's views and images; KL is loss minus it.
        refused: bool: loss or gradients were not finite and nothing was moved.
        features: the teacher's features of this rank's first views.
    """

    loss: Float[Tensor, ""]
    teacher_entropy: Float[Tensor, ""]
    refused: Tensor
    features: Float[Tensor, "B D"]


class Distillation:
    """Student, teacher, center and optimizer, and how one step moves them.

    Args:
        student: the network to train; the teacher starts as its copy.
        loss: temperatures and center.
        schedules: learning rate, weight decay, momentum and teacher temperature of every step.
        optimizer: adamw, sgd or lars.
        clip: largest l2 norm of each gradient tensor; 0 for none.
        drop_path: rate of the student's last block; block 0 has none (linear in between).
        micro_batch: images of this rank that go through the networks at a time; None for all.
            Gradients, center and targets are the same (networks with batch norm must have all).
        streamed: take the groups of views one after the other, which needs the memory of one
            group only; networks whose head has batch norm are never streamed.
        seed: of drop path's draws, which depend on the step and on an image's place in the whole
            batch, but not on ranks, micro-batches or streaming.
        device, precision, ranks: where and how it runs.

    Raises:
        UserError: if micro-batches or drop path are asked of a network that cannot have them.
    """

    def __init__(
        self,
        student: Network,
        loss: DINOLoss,
        schedules: Schedules,
        *,
        optimizer: OptimizerName = "adamw",
        clip: float = 0.0,
        drop_path: float = 0.0,
        micro_batch: int | None = None,
        streamed: bool = True,
        seed: int = 0,
        device: torch.device | None = None,
        precision: Precision = "fp32",
        ranks: Ranks | None = None,
    ) -> None:
        if micro_batch is not None and has_batch_norm(student):
            raise UserError("micro-batches change batch norm's statistics: leave micro_batch out")
        if drop_path and not student.backbone.residual_branches:
            raise UserError(
                "drop path is offered for vit_tiny, vit_small and vit_base: set it to 0"
            )
        self.device = device or torch.device("cpu")
        self.student = student.to(self.device).train()
        synchronize_batch_norm(self.student, self.device)
        self.teacher = make_teacher(self.student)
        self.loss = loss.to(self.device)
        self.schedules, self.clip, self.drop_path = schedules, clip, drop_path
        self.optimizer = make_optimizer(optimizer, self.student)
        self.micro_batch, self.seed = micro_batch, seed
        self.streamed = streamed and not has_batch_norm(student.head)
        self.precision, self.ranks = precision, ranks or Ranks()
        self._parallel = data_parallel(self.student, self.device)

    def step(self, groups: Sequence[Float[Tensor, "_ B C _ _"]], step: int) -> StepReport:
        """Move student, teacher and center once.

        Args:
            groups: this rank's normalised views, those of equal size together; the first group
                holds the teacher's views.
            step: 0-based; decides every scheduled value.
        """
        set_hyperparameters(
            self.optimizer, self.schedules.lr_at(step), self.schedules.weight_decay_at(step)
        )
        self.optimizer.zero_grad(set_to_none=True)
        frozen = self.schedules.backbone_frozen_at(step)
        sums, features = self._accumulate(groups, self.schedules.temperature_at(step), step, frozen)
        if frozen:
            all_mean(p.grad for p in self.student.head.parameters() if p.grad is not None)
        all_sum(sums)
        sums_center, (loss, teacher_entropy) = sums[:-2], sums[-2:] / self.ranks.world

        trained = [p for p in self.student.parameters() if p.grad is not None]
        refused = clip_per_tensor([p.grad for p in trained if p.grad is not None], self.clip)
        refused = refused | ~torch.isfinite(loss)
        if self.schedules.frozen_at(step):
            drop_gradients(self.student.head.last_layer.parameters())
        refusable_step(self.optimizer, refused)
        follow(self.teacher, self.student, self.schedules.momentum_at(step), refused)
        rows = groups[0].shape[0] * groups[0].shape[1] * self.ranks.world
        self.loss.update_center(sums_center, rows, refused)
        return StepReport(loss, teacher_entropy, refused, features)

    def _accumulate(
        self, groups: Sequence[Tensor], temperature: float, step: int, frozen: bool
    ) -> tuple[Float[Tensor, " sums"], Float[Tensor, "B D"]]:
        """Gradients of this rank's whole batch, micro-batch by micro-batch, group by group.

        Those of a frozen backbone do not exist, which DistributedDataParallel would wait for: then
        it is left aside and the head's are averaged by the caller.

        Returns:
            The sum of the teacher's logits, followed by the mean loss and the mean teacher
            entropy of this rank, in one tensor; and the teacher's features of its first views.
        """
        batch, views = groups[0].shape[1], [len(group) for group in groups]
        divisor = pairs(views[0], sum(views)) * batch
        keep = self._keep_factors(sum(views), batch, step)
        network = self.student if frozen else self._parallel
        center_sum = torch.zeros_like(self.loss.center)
        loss, teacher_entropy = center_sum.new_zeros(()), center_sum.new_zeros(())
        features = []
        size = self.micro_batch or batch
        for start in range(0, batch, size):
            part = slice(start, start + size)
            seen, logits = self._teach(groups[0][:, part])
            features.append(seen[0])
            center_sum += logits.sum(dim=(0, 1))
            targets = self.loss.targets(logits, temperature)
            del logits
            teacher_entropy += entropy(targets) * targets.shape[1] / batch
            streams = _streams(groups, targets, keep, part)
            for stream in [[one] for one in streams] if self.streamed else [streams]:
                last = stream[-1] is streams[-1] and start + size >= batch
                images, matched, kept = zip(*stream, strict=True)
                with no_sync(network, skip=not last):
                    with autocast(self.device, self.precision):
                        term = network(images, matched, self.loss.student_temperature, kept, frozen)
                    (term / divisor).backward()
                loss += term.detach() / divisor
        return torch.cat([center_sum, torch.stack([loss, teacher_entropy])]), torch.cat(features)

    @torch.no_grad()
    def _teach(self, images: Float[Tensor, "A b C S S"]) -> tuple[Tensor, Tensor]:
        """The teacher's features [A, b, D] and logits [A, b, K]."""
        with autocast(self.device, self.precision):
            features = self.teacher.forward_features(images)
        return features, self.teacher.logits(features)

    def _keep_factors(self, views: int, batch: int, step: int) -> Tensor | None:
        """Drop path's factors [branches, views, B] of this rank: 0, or 1 / (1 - rate)."""
        if not self.drop_path:
            return None
        branches = self.student.backbone.residual_branches
        rates = torch.linspace(0, self.drop_path, branches // 2).repeat_interleave(2)[:, None, None]
        seed = int(np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(branches, views, batch * self.ranks.world, generator=generator)
        factors = (draws >= rates) / (1 - rates)
        mine = slice(self.ranks.rank * batch, (self.ranks.rank + 1) * batch)
        dtype = next(self.student.parameters()).dtype
        return factors[:, :, mine].to(self.device, dtype, non_blocking=True)


def _streams(
    groups: Sequence[Tensor], targets: Tensor, keep: Tensor | None, part: slice
) -> list[tuple[Tensor, tuple[Tensor, int], Tensor | None]]:
    """For each group: its images, what they must match, and its drop-path factors."""
    streams, first = [], 0
    for group in groups:
        views = slice(first, first + len(group))
        kept = None if keep is None else keep[:, views, part]
        streams.append((group[:, part], match(targets, first), kept))
        first += len(group)
    return streams
