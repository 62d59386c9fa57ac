"""What the paper replaces in its ablations, in naive loops; the rest of a step is `oracle.dino`'s.

Written from appendix B (Sinkhorn-Knopp, softmax over the batch, MSE), section 5.2 (teachers) and
section 5.1 (predictor, InfoNCE with a queue), where the paper names MoCo-v2, BYOL and SwAV.
"""

from __future__ import annotations

import copy
import math

import torch
from oracle.dino import Oracle
from torch import Tensor, nn


def sinkhorn(logits: Tensor, tau: float, iterations: int) -> Tensor:
    """[n, K] to [n, K]: columns, then rows, are divided by their sums; element by element."""
    x = torch.exp(logits / tau)
    for _ in range(iterations):
        for k in range(x.shape[1]):
            x[:, k] = x[:, k] / x[:, k].sum()
        for i in range(x.shape[0]):
            x[i] = x[i] / x[i].sum()
    return x


def batch_softmax(logits: Tensor, tau: float) -> Tensor:
    """[n, K] to [n, K]: the softmax of each prototype over the batch, then rows to sum 1."""
    x = torch.softmax(logits / tau, dim=0)
    return x / x.sum(dim=1, keepdim=True)


def one_hot(logits: Tensor) -> Tensor:
    """The limit of the softmax at temperature 0."""
    x = torch.zeros_like(logits)
    for i, row in enumerate(logits):
        x[i, int(row.argmax())] = 1
    return x


def unit(row: Tensor) -> Tensor:
    return row / torch.sqrt((row**2).sum())


class AblationOracle(Oracle):
    """Algorithm 1 with one part replaced; the names are those of the settings.

    Args:
        targets: centering, sinkhorn, batch_softmax or none.
        loss: cross_entropy, mse or contrastive.
        teacher: momentum, previous_iteration, previous_epoch or student_copy.
        epoch: steps of an epoch.
        queue: [Q, K], the negatives before the first step.
        sgd: SGD with momentum .9 instead of AdamW, which would blow up the rounding of gradients
            that are 0, as those of a bias before batch norm.
    """

    def __init__(
        self,
        student: nn.Module,
        prototypes: int,
        *,
        targets: str = "centering",
        loss: str = "cross_entropy",
        teacher: str = "momentum",
        epoch: int = 4,
        queue: Tensor | None = None,
        sgd: bool = False,
    ) -> None:
        super().__init__(student, prototypes)
        self.teacher.predictor = None
        self.targets, self.loss, self.kind, self.epoch = targets, loss, teacher, epoch
        self.queue, self.sgd = queue, sgd
        self.done = 0

    def step(
        self,
        views: list[Tensor],
        *,
        lr: float,
        wd: float,
        lam: float,
        tau_t: float,
        clip: float = 0.0,
        frozen: bool = False,
        tau_s: float = 0.1,
    ) -> float:
        before = copy.deepcopy(list(self.student.parameters()))
        s = self._outputs(self.student, views)
        t = [row.detach() for row in self._outputs(self.teacher, views[:2])]
        targets = self._targets(torch.cat(t), tau_t).split(len(t[0]))
        total, count = torch.zeros((), dtype=torch.float64), 0
        for a, target in enumerate(targets):
            for v, output in enumerate(s):
                if a == v:
                    continue
                for q, row in zip(target, output, strict=True):
                    total = total + self._term(q, row, tau_s) / len(target)
                count += 1
        value = total / count
        self.student.zero_grad()
        value.backward()
        self.center = self.m * self.center + (1 - self.m) * torch.cat(t).mean(0)
        if self.queue is not None:
            self.queue = torch.cat([self.queue, *targets])[-len(self.queue) :]
        for name, p in self.student.named_parameters():
            if p.grad is not None:
                decay = 0.0 if name.endswith(".bias") or p.ndim == 1 else wd
                (self._sgd if self.sgd else self._adamw)(name, p, lr, decay)
        self.done += 1
        self._follow(before, lam)
        return value.item()

    def _sgd(self, name: str, p: nn.Parameter, lr: float, wd: float) -> None:
        assert p.grad is not None
        zeros = torch.zeros_like(p)
        momentum = 0.9 * self.moments.get(name, (zeros, zeros, 0))[0] + p.grad + wd * p.detach()
        self.moments[name] = momentum, zeros, 0
        with torch.no_grad():
            p -= lr * momentum

    def _outputs(self, network: nn.Module, views: list[Tensor]) -> list[Tensor]:
        """The head takes all views in one batch, which matters only for batch norm."""
        features = torch.cat([network.backbone(view) for view in views])
        head, predictor = network.head, getattr(network, "predictor", None)
        z = head.mlp(features)
        if head.bottleneck is None:
            z = head.last_layer(z)
            z = z if predictor is None else predictor(z)
        else:
            z = z if predictor is None else predictor(z)
            z = head.last_layer(torch.stack([unit(row) for row in z]))
        return list(z.split(len(views[0])))

    def _targets(self, logits: Tensor, tau: float) -> Tensor:
        centered = logits - self.center if self.targets == "centering" else logits
        if self.loss != "cross_entropy":
            return torch.stack([unit(row) for row in centered])
        if self.targets == "sinkhorn":
            return sinkhorn(logits, tau, 3)
        if self.targets == "batch_softmax":
            return batch_softmax(logits, tau)
        if tau == 0:
            return one_hot(centered)
        return torch.stack([torch.exp(r / tau) / torch.exp(r / tau).sum() for r in centered])

    def _term(self, target: Tensor, output: Tensor, tau: float) -> Tensor:
        if self.loss == "mse":
            return ((unit(output) - target) ** 2).sum()
        if self.loss == "contrastive":
            assert self.queue is not None
            query = unit(output)
            positive = torch.exp((query * target).sum() / tau)
            negatives = sum(torch.exp((query * key).sum() / tau) for key in self.queue)
            return -torch.log(positive / (positive + negatives))
        p = torch.exp(output / tau)
        return -(target * torch.log(p / p.sum())).sum()

    def _follow(self, before: list[Tensor], lam: float) -> None:
        """The teacher after the step `done`; `before` are the student's weights before it."""
        now = list(self.student.parameters())
        with torch.no_grad():
            # The student's predictor comes last and has no counterpart.
            for own, old, new in zip(self.teacher.parameters(), before, now, strict=False):
                if self.kind == "momentum":
                    own.copy_(lam * own + (1 - lam) * new)
                elif self.kind == "previous_iteration":
                    own.copy_(old)
                elif self.kind == "student_copy" or self.done % self.epoch == 0:
                    own.copy_(new)


def info_nce(query: Tensor, keys: Tensor, negatives: Tensor, tau: float) -> float:
    """The loss of one query and its positive keys, number by number."""
    total = 0.0
    for key in keys:
        positive = math.exp(float(query @ key) / tau)
        total -= math.log(
            positive / (positive + sum(math.exp(float(query @ n) / tau) for n in negatives))
        )
    return total
