"""One step of training: Algorithm 1 of the paper with multi-crop, for any number of processes.

Shapes: A teacher views, V views of a group, B images of this rank, K prototypes, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.distillation.loss import StudentLoss, StudentViews, num_pairs
from dino.distillation.optimizer import (
    OptimizerName,
    clip_per_tensor,
    make_optimizer,
    set_hyperparameters,
    step_unless,
)
from dino.distillation.schedules import Schedules
from dino.distillation.targets import (
    KeyQueue,
    Targets,
    entropy,
    keys_for_views,
    targets_for_views,
)
from dino.distillation.teacher import Teacher
from dino.files import UserError
from dino.models.backbone import has_batch_norm
from dino.runtime import (
    Precision,
    Ranks,
    all_cat,
    all_mean,
    all_sum,
    autocast,
    data_parallel,
    no_sync,
    synchronize_batch_norm,
)


@dataclass(frozen=True)
class StepReport:
    """The measures of one step over all ranks, as tensors on the device.

    Attributes:
        terms: the terms of the loss by name, in nats: means over pairs of views and images.
        teacher_entropy: h(P_t), mean over the teacher's views and images; KL is the cross-entropy
            minus it. NaN where the targets are no distributions.
        target_spread: 1 - |mean target|^2 over the teacher's views and images of all ranks, where
            the targets are vectors of length 1: 0 if all are equal. NaN for distributions.
        found_inf: bool: loss or gradients were not finite and nothing was updated.
        features: the teacher's features of this rank's first views.
    """

    terms: dict[str, Float[Tensor, ""]]
    teacher_entropy: Float[Tensor, ""]
    target_spread: Float[Tensor, ""]
    found_inf: Tensor
    features: Float[Tensor, "B D"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The sum of the terms, which is minimised."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass
class _Sums:
    """Sums over the micro-batches of this rank: logits and, of unit vectors, targets, both [K].

    The rest adds up to means. `keys` are the targets of a queue.
    """

    logits: Tensor
    targets: Tensor
    teacher_entropy: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    features: list[Float[Tensor, "b D"]]
    keys: list[Float[Tensor, "A b K"]]

    def reduce(self, world: int) -> None:
        """Add up logits and targets, and average the rest, over all ranks."""
        means = torch.stack([self.teacher_entropy, *self.terms.values()])
        sizes = [len(self.logits), len(self.targets), len(means)]
        packed = all_sum(torch.cat([self.logits, self.targets, means]))
        self.logits, self.targets, means = packed.split(sizes)
        means = means / world
        self.teacher_entropy = means[0]
        self.terms = dict(zip(self.terms, means[1:], strict=True))


class Distillation:
    """Student, teacher, targets and optimizer, and one step of their training.

    Args:
        loss: the student and its loss; the teacher starts as a copy of the student.
        targets: the operation on the teacher's logits.
        schedules: learning rate, weight decay, momentum and teacher temperature of every step.
        optimizer: adamw, sgd or lars.
        clip: largest l2 norm of each gradient tensor; 0 for none.
        drop_path: rate of the student's last block; block 0 has none (linear in between).
        micro_batch: images of this rank at a time, with the same result; None for all, which
            whatever relates the images of a batch to each other requires (`needs_full_batch`).
        streamed: process the groups of views one after the other, with the memory of one group;
            heads with batch norm are never streamed.
        seed: of drop path and of the patches that are left out, whose draws depend on the step and
            on an image's position in the effective batch, but not on ranks, micro-batches or
            streaming.
        device, precision, ranks: as in `dino.runtime`.

    Raises:
        UserError: for micro-batches or drop path with a network that cannot have them.
    """

    def __init__(
        self,
        loss: StudentLoss,
        targets: Targets,
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
        self.needs_full_batch = loss.needs_full_batch or targets.needs_full_batch
        if micro_batch is not None and (needs := self.needs_full_batch):
            raise UserError(f"{needs} needs all images of a step at once: leave micro_batch out")
        if loss.kind != "cross_entropy" and not targets.unit:
            raise UserError(f"the loss {loss.kind} compares vectors of length 1: take unit targets")
        if drop_path and not loss.student.backbone.has_drop_path:
            raise UserError("only ViTs have drop path: set it to 0")
        if schedules.token_dropout and not loss.student.backbone.has_drop_path:
            raise UserError("only ViTs have tokens to drop: set it to 0")
        self.device = device or torch.device("cpu")
        self.loss, self.student = loss.to(self.device).train(), loss.student
        synchronize_batch_norm(self.student, self.device)
        self.teacher = Teacher(self.student, lambda step: self.schedules.momentum_at(step))
        self.targets = targets.to(self.device)
        self.schedules, self.clip, self.drop_path = schedules, clip, drop_path
        self.optimizer = make_optimizer(optimizer, self.student)
        self.micro_batch, self.seed = micro_batch, seed
        self.streamed = streamed and not any(map(has_batch_norm, self.student.new))
        self.precision, self.ranks = precision, ranks or Ranks()
        self._parallel = data_parallel(self.loss, self.device)

    def stored(self) -> dict[str, nn.Module]:
        """The modules in a checkpoint, by the names of their files."""
        return {"student": self.student, "teacher": self.teacher, "loss": self.targets}

    def step(
        self,
        groups: Sequence[Float[Tensor, "_ B C _ _"]],
        step: int,
        progress: Callable[[float], object] | None = None,
    ) -> StepReport:
        """Update student, teacher and center once.

        Args:
            groups: this rank's normalised views, those of equal size together; the first group
                holds the teacher's views.
            step: 0-based; for the schedules.
            progress: called during the step with the share of it that is done, in 0..1.
        """
        set_hyperparameters(
            self.optimizer, self.schedules.lr_at(step), self.schedules.weight_decay_at(step)
        )
        self.optimizer.zero_grad(set_to_none=True)
        frozen = step < self.schedules.backbone_freeze_steps
        sums = self._accumulate(groups, step, frozen, progress)
        if frozen:
            new = chain.from_iterable(module.parameters() for module in self.student.new)
            all_mean(p.grad for p in new if p.grad is not None)
        sums.reduce(self.ranks.world)

        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        found_inf = clip_per_tensor(gradients, self.clip)
        for term in sums.terms.values():
            found_inf = found_inf | ~torch.isfinite(term)
        if step < self.schedules.freeze_steps:
            self.student.head.last_layer.zero_grad()  # no update, no weight decay, no moments
        behind = self.schedules.teacher == "previous_iteration"
        if behind:
            self.teacher.update(self.student, step, found_inf)
        step_unless(found_inf, self.optimizer)
        if not behind:
            self.teacher.update(self.student, step, found_inf)
        rows = groups[0].shape[0] * groups[0].shape[1] * self.ranks.world
        self.targets.update(sums.logits, rows, found_inf)
        if isinstance(self.targets, KeyQueue):
            self.targets.enqueue(all_cat(torch.cat(sums.keys, dim=1), dim=1), found_inf)
        spread = sums.teacher_entropy.new_full((), math.nan)
        if self.targets.unit:
            spread = 1 - (sums.targets / rows).square().sum()
        features = torch.cat(sums.features)
        return StepReport(sums.terms, sums.teacher_entropy, spread, found_inf, features)

    def rehearse(self, groups: Sequence[Float[Tensor, "_ B C _ _"]], step: int) -> None:
        """Forward and backward of `step` as a measurement: nothing that is trained changes."""
        buffers = [*self.student.buffers(), *self.teacher.buffers()]
        before = [buffer.clone() for buffer in buffers]
        self._accumulate(groups, step, frozen=step < self.schedules.backbone_freeze_steps)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _accumulate(
        self,
        groups: Sequence[Tensor],
        step: int,
        frozen: bool,
        progress: Callable[[float], object] | None = None,
    ) -> _Sums:
        """Gradients of this rank's batch, micro-batch by micro-batch, group by group.

        DistributedDataParallel would wait for the gradients of a frozen backbone: it is bypassed,
        and the caller averages the gradients of the head.
        """
        batch, views = groups[0].shape[1], sum(map(len, groups))
        self.loss.divisor = num_pairs(len(groups[0]), views) * batch
        student = self.loss if frozen else self._parallel
        scales = self._drop_path_scales(views, batch, step)
        patches = self._patches(groups[0], step)
        temperature = self.schedules.temperature_at(step)
        mixed = partial(autocast, self.device, self.precision)
        zero = torch.zeros((), device=self.device)
        sums = _Sums(zero, zero.new_zeros(0), zero, {}, [], [])
        size, unit = self.micro_batch or batch, self.targets.unit
        queue = self.targets if isinstance(self.targets, KeyQueue) else None
        if unit:
            sums.targets, sums.teacher_entropy = zero, zero + math.nan
        for start in range(0, batch, size):
            images = slice(start, start + size)
            with mixed():
                features, logits = self.teacher(groups[0][:, images])
            sums.features.append(features[0])
            sums.logits = sums.logits + logits.sum(dim=(0, 1))
            targets = self.targets.targets(logits, temperature)
            del logits
            if unit:
                sums.targets = sums.targets + targets.sum(dim=(0, 1))
                sums.keys += [targets] if queue else []
            else:
                share = targets.shape[1] / batch
                sums.teacher_entropy = sums.teacher_entropy + entropy(targets) * share

            student_views = _student_views(groups, targets, scales, patches, images, queue)
            passes = [[v] for v in student_views] if self.streamed else [student_views]
            for number, one_pass in enumerate(passes, 1):
                last = number == len(passes) and start + size >= batch
                with no_sync(student, skip=not last):
                    with mixed():
                        terms = student(one_pass, frozen)
                    sum(terms.values()).backward()
                for name, term in terms.items():
                    sums.terms[name] = sums.terms.get(name, zero) + term.detach()
                if progress is not None:
                    progress(min(1.0, (start + size * number / len(passes)) / batch))
        return sums

    def _drop_path_scales(self, views: int, batch: int, step: int) -> Tensor | None:
        """Drop path's factors [branches, views, B] of this rank: 0, or 1 / (1 - rate)."""
        if not self.drop_path:
            return None
        branches = self.student.backbone.residual_branches
        rates = torch.linspace(0, self.drop_path, branches // 2).repeat_interleave(2)[:, None, None]
        draws = self._draws(branches, views, batch, self.seed, step)
        factors = (draws >= rates) / (1 - rates)
        dtype = next(self.student.parameters()).dtype
        return factors.to(self.device, dtype, non_blocking=True)

    def _patches(self, views: Tensor, step: int) -> Int[Tensor, "V B k"] | None:
        """The patches of each global view of this rank that the student processes, in order."""
        rate, side = self.schedules.token_dropout_at(step), self.student.backbone.patch_size
        if not rate or side is None:
            return None
        count = math.prod(size // side for size in views.shape[-2:])
        if (kept := max(1, round(count * (1 - rate)))) == count:
            return None
        draws = self._draws(count, len(views), views.shape[1], self.seed, step, 1)
        chosen = draws.argsort(dim=0)[:kept].sort(dim=0).values
        return chosen.permute(1, 2, 0).to(self.device, non_blocking=True)

    def _draws(
        self, rows: int, views: int, batch: int, *key: int
    ) -> Float[Tensor, "{rows} {views} {batch}"]:
        """Uniform numbers for the images of this rank, from those of all ranks."""
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(rows, views, batch * self.ranks.world, generator=generator)
        return draws.unflatten(2, (-1, batch))[:, :, self.ranks.rank]


def _student_views(
    groups: Sequence[Tensor],
    targets: Tensor,
    scales: Tensor | None,
    patches: Tensor | None,
    images: slice,
    queue: KeyQueue | None,
) -> list[StudentViews]:
    """Some images of each group, with targets, drop-path factors and patches (global views)."""
    found, first = [], 0
    for group in groups:
        scale = None if scales is None else scales[:, first : first + len(group), images]
        summed, count = targets_for_views(targets, first)
        chosen = patches[:, images] if patches is not None and first == 0 else None
        views = StudentViews(group[:, images], summed, count, scale, chosen, first == 0)
        if queue is not None:
            keys = keys_for_views(targets, first)
            views = replace(views, keys=keys, negatives=queue.negatives)
        found.append(views)
        first += len(group)
    return found
