"""Token dropout: the student's global views lack patches, fewer and fewer with time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small import assert_same, distillation, groups, network, schedules, state
from torch import Tensor

from dino.distillation.loss import StudentLoss
from dino.distillation.network import Network
from dino.distillation.step import Distillation
from dino.distillation.targets import Centering
from dino.files import UserError
from dino.models.convnet import ResNet
from dino.models.head import Head
from dino.models.vit import ViT
from dino.runtime import Ranks

HALF = schedules(token_dropout=0.5)


def test_the_share_falls_to_none_at_three_quarters_of_the_run() -> None:
    shares = [schedules(token_dropout=0.8).token_dropout_at(step) for step in range(40)]
    assert shares[0] == 0.8
    assert shares[15] == pytest.approx(0.4)
    assert shares[30:] == [0.0] * 10
    assert HALF.ending(20, 0).token_dropout_at(15) == 0.0  # of the run's real length


def test_without_dropped_patches_a_step_has_the_same_bits() -> None:
    plain, late = distillation(), distillation(planned=HALF)
    plain.step(groups(0), 30)
    late.step(groups(0), 30)
    assert_same(state(late), state(plain))
    early = distillation(planned=HALF)
    early.step(groups(0), 0)
    assert not torch.equal(
        early.student.head.last_layer.weight_v, plain.student.head.last_layer.weight_v
    )


@pytest.mark.parametrize(
    "options", [{}, {"registers": 3}, {"registers": 2, "position": "rope"}], ids=str
)
def test_a_vit_computes_the_chosen_patches_only(options: dict[str, Any]) -> None:
    vit = ViT(patch_size=8, embed_dim=24, depth=2, heads=2, image_size=32, **options)
    vit = vit.double().eval()
    images, chosen = (
        torch.randn(3, 3, 32, 24).double(),
        torch.tensor([[0, 7, 2], [11, 3, 4], [5, 6, 1]]),
    )
    found = vit(images, patches=chosen)

    def oracle(image: Tensor, kept: list[int]) -> Tensor:
        x, grid = vit.tokens(image[None])
        first = 1 + vit.registers
        rows = [*range(first), *(first + index for index in kept)]
        rope = vit._rope(grid)
        for block in vit.blocks:
            x = block(
                x[:, rows] if block is vit.blocks[0] else x,
                rope=rope and tuple(table[rows] for table in rope),
            )
        return vit.norm(x)[0, 0]

    expected = [oracle(image, kept) for image, kept in zip(images, chosen.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    changed = images.clone()
    changed[0, :, :8, 8:16] = 5.0  # patch 1, which the first image lacks and the last has
    changed[2, :, :8, 8:16] = 5.0
    again = vit(changed, patches=chosen)
    assert torch.equal(again[:2], found[:2])
    assert not torch.allclose(again[2], found[2])


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"streamed": False}])
def test_micro_batches_and_streaming_change_nothing(options: dict[str, Any]) -> None:
    entire, parts = distillation(planned=HALF), distillation(planned=HALF, **options)
    for step in range(3):
        a, b = entire.step(groups(step), step), parts.step(groups(step), step)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-11)
    assert_same(state(parts), state(entire), 1e-7)


def test_patches_of_two_ranks_are_those_of_one_and_change_with_the_step() -> None:
    views = torch.zeros(2, 6, 3, 32, 32)
    whole, later = (distillation(planned=HALF)._patches(views, step) for step in (3, 4))
    halves = [
        distillation(planned=HALF, ranks=Ranks(rank, 2, rank))._patches(views[:, :3], 3)
        for rank in range(2)
    ]
    assert whole is not None
    assert later is not None
    assert whole.shape == (2, 6, 9)  # 45 % of 16 are dropped
    assert all(len(set(row)) == 9 for row in whole.flatten(0, 1).tolist())
    assert torch.equal(torch.cat([h for h in halves if h is not None], dim=1), whole)
    assert not torch.equal(later, whole)
    assert not torch.equal(whole[0], whole[1])


def test_only_the_students_global_views_lack_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = ViT.forward

    def recorded(self: ViT, images: Tensor, *args: Any, **options: Any) -> Tensor:
        patches = options.get("patches")
        seen.append(
            (images.shape[-1], self.training, patches if patches is None else patches.shape)
        )
        return forward(self, images, *args, **options)

    monkeypatch.setattr(ViT, "forward", recorded)
    ours = distillation(planned=HALF)
    seen.clear()
    ours.step(groups(0), 0)
    assert seen[0][2] is None  # the teacher
    assert seen[1:] == [(16, True, (8, 2)), (8, True, None)]


def test_a_convnet_has_no_tokens_to_drop() -> None:
    backbone = ResNet("resnet18")
    student = Network(backbone, Head(backbone.embed_dim, 16, hidden=32, bottleneck=8))
    with pytest.raises(UserError, match="have tokens to drop"):
        Distillation(StudentLoss(student), Centering(16), HALF)
    assert network().backbone.has_drop_path
