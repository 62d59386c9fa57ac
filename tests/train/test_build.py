"""Which settings an architecture has, and which sizes of views it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small import TINY_RUN, images

from dino.distillation.step import Distillation
from dino.files import UserError
from dino.pretraining import pretrain
from dino.runtime import Ranks
from dino.train.build import build, check_memory
from dino.train.recipes import recipe

VIT_ONLY = ("model.embed_dim", "model.depth", "model.heads", "model.patch_size", "model.drop_path")
SMALL = {name: value for name, value in TINY_RUN.items() if name not in VIT_ONLY}
SMALL |= {"teacher.temperature_warmup": "1 steps"}


def built(arch: str, **settings: Any) -> Distillation:
    config = recipe("small_data").changed({**SMALL, "model.arch": arch, **settings})
    config = config.for_architecture()
    return build(config, config.schedules(8), torch.device("cpu"), Ranks())


@pytest.mark.parametrize(
    ("arch", "size", "embed_dim"),
    [
        ("resnet18", 64, 512),
        ("mobilenetv3_small_050", 64, 1024),  # the pooled feature is not `num_features` long
        ("vit_tiny_patch16_224", 50, 192),
        ("vit_small_patch14_dinov2", 40, 384),  # 14 divides neither 40 nor 64
    ],
)
def test_timm_networks_need_no_other_flag(arch: str, size: int, embed_dim: int) -> None:
    views = {"views.global_size": 64, "views.local_size": size}
    distillation = built(f"timm:{arch}", **views)
    assert distillation.student.backbone.embed_dim == embed_dim
    groups = [torch.randn(2, 2, 3, 64, 64), torch.randn(2, 2, 3, size, size)]
    assert torch.isfinite(distillation.step(groups, 0).loss)


def test_a_network_of_timm_is_trained_from_the_recipe_as_it_is(tmp_path: Path) -> None:
    settings = {**SMALL, "model.arch": "timm:resnet10t", "run.duration": "1 steps"}
    sizes = {"views.global_size": 64, "views.local_size": 32}
    pretrain(data=images(4), out=tmp_path / "run", settings=settings | sizes)
    assert (tmp_path / "run" / "teacher.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.arch": "timm:resnet10t", "model.patch_size": 8}, "leave out --model.patch-size"),
        ({"model.arch": "resnet50", "model.drop_path": 0.1}, "leave out --model.drop-path"),
        ({"model.arch": "resnet34"}, "unknown architecture 'resnet34'.*timm:resnet34"),
        (
            {"model.arch": "timm:maxvit_rmlp_pico_rw_256", "views.global_size": 256},
            r"timm:maxvit_rmlp_pico_rw_256 takes no images of 8 px \(.*\): change the size",
        ),
    ],
)
def test_what_an_architecture_lacks_is_refused_before_the_run(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(data=images(4), out=tmp_path / "run", settings=SMALL | settings)
    assert not (tmp_path / "run" / "config.json").exists()


def test_building_leaves_the_random_state_and_the_statistics(monkeypatch: Any) -> None:
    normal, states = built("timm:resnet10t", **{"views.global_size": 64}), []
    monkeypatch.setattr("dino.models.backbone.Backbone.check_size", lambda *_: states.append(1))
    other = built("timm:resnet10t", **{"views.global_size": 64})
    assert len(states) == 2
    for ours, theirs in zip(
        normal.student.state_dict().values(), other.student.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert normal.student.training


@pytest.mark.parametrize("arch", ["vit_small", "resnet50", "timm:resnet10t", "timm:test_vit"])
def test_the_memory_of_every_architecture_is_counted(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino.train.build.total_memory", lambda device: 2**20)
    config = recipe("small_data").changed({**SMALL, "model.arch": arch}).for_architecture()
    with pytest.raises(UserError, match=r"the parameters and the views .* lower --batch or sizes"):
        check_memory(config, torch.device("cpu"), Ranks())
