"""A peer: one DINO training step in the published code's order of work, written plainly.

Views of equal size concatenated, one backbone pass a size, one head pass on all outputs; attention
materialised; every token through the last block; logits of all views materialised; a log-softmax
for each view; clipping with a host read per tensor; the EMA in a Python loop. Written from the
description of the method, not copied.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = keep + torch.rand(
            (x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device
        )
        return x.div(keep) * mask.floor_()


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop_path = DropPath(rate)

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainViT(nn.Module):
    def __init__(
        self, width: int, depth: int, heads: int, patch: int, size: int, rate: float
    ) -> None:
        super().__init__()
        self.patch, self.side = patch, size // patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, self.side**2 + 1, width) * 0.02)
        rates = torch.linspace(0, rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(width, heads, r) for r in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[-2] // self.patch
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        pos = self.pos
        if rows != self.side:
            patches = pos[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            scale = (rows + 0.1) / self.side
            patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
            pos = torch.cat([pos[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        x = x + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class PlainHead(nn.Module):
    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2048),
            nn.GELU(),
            nn.Linear(2048, 2048),
            nn.GELU(),
            nn.Linear(2048, 256),
        )
        self.last = weight_norm(nn.Linear(256, prototypes, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class PlainDINO:
    """Student, teacher and `step`, with the sizes of ViT-S/16 unless told otherwise."""

    def __init__(
        self,
        prototypes: int,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        rate: float = 0.1,
        size: int = 224,
        device: torch.device | None = None,
        bf16: bool = False,
    ) -> None:
        def build(rate: float) -> nn.ModuleList:
            vit = PlainViT(width, depth, heads, 16, size, rate)
            return nn.ModuleList([vit, PlainHead(width, prototypes)]).to(device)

        self.student, self.teacher, self.bf16 = build(rate), build(0.0), bf16
        self.teacher.load_state_dict(copy.deepcopy(self.student.state_dict()))
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, prototypes, device=device)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.04)

    @staticmethod
    def forward(network: nn.ModuleList, views: list[Tensor]) -> Tensor:
        backbone, head = network
        sizes = [view.shape[-1] for view in views]
        outputs, start = [], 0
        while start < len(views):
            end = start
            while end < len(views) and sizes[end] == sizes[start]:
                end += 1
            outputs.append(backbone(torch.cat(views[start:end])))
            start = end
        return head(torch.cat(outputs))

    def step(self, views: list[Tensor]) -> float:
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            teacher = self.forward(self.teacher, views[:2])
            student = self.forward(self.student, views)
        teacher, student = teacher.float(), student.float()
        targets = F.softmax((teacher - self.center) / 0.04, dim=-1).detach().chunk(2)
        total, terms = student.new_zeros(()), 0
        for a, target in enumerate(targets):
            for v, logits in enumerate((student / 0.1).chunk(len(views))):
                if v != a:
                    total = (
                        total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    )
                    terms += 1
        loss = total / terms
        self.center = self.center * 0.9 + teacher.mean(dim=0, keepdim=True) * 0.1
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                coefficient = 3.0 / (parameter.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for theirs, own in pairs:
                own.mul_(0.996).add_(theirs, alpha=0.004)
        return loss.item()
