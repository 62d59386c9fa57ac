"""Recipes hold the published numbers, and settings that cannot work are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dino import cli
from dino.files import UserError
from dino.train.config import PretrainConfig, setting_names
from dino.train.recipes import RECIPES, demo, recipe, vit_s16

IMAGES = 1_281_167

# Published arguments: peak lr, min lr, clip, freeze epochs, tt start / end / epochs, batch, epochs,
# K, norm fixed, global scale from, local scale to, local crops
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "vit_s16": (0.002, 1e-5, 0, 1, 0.04, 0.07, 30, 1024, 800, 65536, False, 0.25, 0.25, 10),
    "vit_s8": (0.002, 1e-6, 3.0, 1, 0.04, 0.07, 30, 1024, 800, 65536, False, 0.4, 0.4, 10),
    "vit_b16": (0.003, 2e-6, 0.3, 3, 0.04, 0.07, 50, 1024, 400, 65536, True, 0.25, 0.25, 10),
    "vit_b8": (0.0020625, 2e-6, 3.0, 3, 0.03, 0.07, 50, 1056, 300, 65536, True, 0.25, 0.25, 10),
    "resnet50": (4.78125, 0.0048, 0, 1, 0.04, 0.07, 50, 4080, 800, 60000, True, 0.14, 0.14, 6),
    "vanilla": (0.001, 1e-6, 3.0, 1, 0.04, 0.04, 0, 512, 100, 65536, True, 0.4, 0.4, 8),
    "boost": (0.002, 1e-6, 3.0, 1, 0.04, 0.07, 30, 1024, 300, 65536, False, 0.4, 0.4, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_numbers(name: str) -> None:
    config = recipe(name)
    per_epoch = IMAGES // config.run.batch
    planned = config.schedules(per_epoch)
    assert (
        pytest.approx(planned.lr),
        planned.lr_end,
        config.optim.clip,
        planned.freeze_steps / per_epoch,
        planned.temperature_at(0),
        planned.temperature,
        planned.temperature_epochs,
        config.run.batch,
        planned.total / per_epoch,
        config.head.prototypes,
        config.head.fixed_norm,
        config.views.global_scale[0],
        config.views.local_scale[1],
        config.views.local_count,
    ) == PUBLISHED[name]
    assert planned.warmup == 10 * per_epoch
    assert (planned.momentum, planned.momentum_end) == (0.996, 1.0)
    assert config.teacher.center_momentum == 0.9
    assert config.teacher.student_temperature == 0.1
    assert config.head.batch_norm == (name == "resnet50")
    decay = (1e-6, 1e-6) if name == "resnet50" else (0.04, 0.4)
    assert (planned.weight_decay, planned.weight_decay_end) == decay
    assert config.model.drop_path == (0.0 if name == "resnet50" else 0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound(name: str) -> None:
    config = recipe(name)
    assert config.check() == []
    assert config.schedules(1000).total > 0
    first, second, *local = config.views.specs()
    if name not in ("demo", "laptop"):  # as in the paper; small images are not blurred
        assert (first.blur, second.blur) == (1.0, 0.1)
        assert (first.solarize, second.solarize) == (0.0, 0.2)
        assert [spec.blur for spec in local] == [0.5]
    json.dumps(config.defining())


def test_unknown_recipes_and_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'vits': did you mean vit_s8 or vit_s16"):
        recipe("vits")
    for wrong in ("optim.lrr", "lr", "nothing.lr"):
        with pytest.raises(UserError, match=f"no setting '{wrong}'"):
            demo().changed({wrong: 1})
    for wrong, right in {
        "optim.lrr": "optim.lr",
        "bacth": "run.batch",
        "no.warmup": "optim.warmup",
        "patchsize": "model.patch_size",
    }.items():
        with pytest.raises(UserError, match=f"'{wrong}': did you mean {right}"):
            demo().changed({wrong: 1})
    with pytest.raises(UserError, match=r"'optim.wd': see dino pretrain --help"):
        demo().changed({"optim.wd": 1})
    with pytest.raises(UserError, match=r"it is a group .* such as optim.optimizer"):
        demo().changed({"optim": {"lr": 1}})


def test_settings_may_have_dashes() -> None:
    named = setting_names({"optim.weight-decay": 1, "--optim.lr-end": 2, "run.batch": 3})
    assert named == {"optim.weight_decay": 1, "optim.lr_end": 2, "run.batch": 3}
    with pytest.raises(UserError, match=r"one setting twice: optim.lr_end, optim.lr-end"):
        setting_names({"optim.lr_end": 1, "optim.lr-end": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"views.global_size": 225},
            r"views.global_size 225 is not a multiple .* 16: take 224 or 240",
        ),
        ({"views.local_size": 8}, r"views.local_size 8 .*: take 16"),
        ({"model.drop_path": 1.0}, r"model.drop_path is 1.0: .* of at least 0 and below 1"),
        ({"teacher.temperature": -0.1}, r"teacher.temperature is -0.1: .* at least 0"),
        (
            {"teacher.targets": "sinkhorn", "teacher.temperature": 0.0},
            r"teacher.targets sinkhorn divides by .* take teacher.temperature",
        ),
        ({"optim.loss": "mse", "teacher.targets": "sinkhorn"}, "take teacher.targets centering or"),
        ({"optim.loss": "contrastive"}, r"loss contrastive compares .* teacher.targets none"),
        (
            {"head.predictor": True, "head.bottleneck": None},
            r"head.predictor maps the bottleneck .* set head.bottleneck",
        ),
        ({"teacher.student_temperature": 0}, r"student_temperature is 0"),
        ({"teacher.momentum": 1.5}, r"teacher.momentum is 1.5: .* from 0 to 1"),
        ({"teacher.center_momentum": -0.1}, r"center_momentum is -0.1"),
        ({"optim.optimizer": "adam"}, r"optim.optimizer is 'adam': .*'adamw' or 'sgd' or 'lars'"),
        ({"optim.optimizer": "SGD"}, r"optim.optimizer is 'SGD'"),
        ({"optim.lr": -1}, r"optim.lr is -1"),
        ({"optim.lr": float("nan")}, r"optim.lr is nan"),
        ({"optim.lr": float("inf")}, r"optim.lr is inf"),
        ({"optim.weight_decay_end": float("nan")}, r"weight_decay_end is nan"),
        ({"optim.clip": -1.0}, r"optim.clip is -1.0"),
        ({"optim.warmup": "ten epochs"}, r"optim.warmup is 'ten epochs': it must be a duration"),
        ({"run.duration": "9" * 400 + " steps"}, r"run.duration is"),
        ({"execution.precision": "fp16"}, r"precision is 'fp16'"),
        ({"execution.micro_batch": -1}, r"micro_batch is -1"),
        ({"execution.micro_batch": 0}, r"micro_batch is 0"),
        ({"execution.workers": -1}, r"workers is -1"),
        ({"execution.keep": 0}, r"keep is 0"),
        ({"execution.tensorboard": "no"}, r"tensorboard is 'no': it must be True or False"),
        ({"head.activation": "silu"}, r"activation is 'silu'"),
        ({"head.layers": 10**9}, r"head.layers is 1000000000"),
        ({"model.patch_size": 0}, r"patch_size is 0"),
        ({"model.patch_size": "8"}, r"patch_size is '8': it must be an integer"),
        ({"model.patch_size": 8.0}, r"patch_size is 8.0"),
        ({"model.arch": 3}, r"model.arch is 3: it must be text"),
        ({"model.depth": 10**6}, r"model.depth is 1000000"),
        ({"run.seed": 10**30}, r"run.seed is 10+"),
        ({"run.seed": -1}, r"run.seed is -1"),
        ({"views.blur": (1.0, 0.1)}, r"views.blur is \(1.0, 0.1\): it must be 3 numbers"),
        ({"views.flip": 1.5}, "views.flip is 1.5: it must be a number from 0 to 1"),
        ({"views.global_scale": (0.5, 0.2)}, r"global1\.scale is from 0.5 to 0.2"),
        (
            {"views.local_scale": (0.0, 0.2)},
            "views.local_scale is .* numbers above 0 and of at most 1",
        ),
        ({"views.hue": float("nan")}, r"views.hue is nan"),
        ({"pixels.std": (0.0, 1.0, 1.0)}, r"pixels.std is .* above 0"),
        ({"optim.lr": 100, "optim.weight_decay": 1}, r"a learning rate of 400 .* lower one"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        vit_s16().changed(settings).check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optim.warmup": "11 epochs"},
            r"optim.warmup '11 epochs' is too long for run.duration '10 epochs'",
        ),
        ({"teacher.temperature_warmup": "30 epochs"}, r"teacher.temperature_warmup '30 epochs'"),
        ({"optim.freeze_backbone": "10 epochs"}, r"optim.freeze_backbone '10 epochs' is too long"),
        ({"run.duration": "0 epochs"}, r"has no step"),
        ({"run.duration": "10%"}, r"not a duration"),
    ],
)
def test_durations_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    base = demo().changed({"run.duration": "10 epochs"})
    with pytest.raises(UserError, match=words):
        base.changed(settings).schedules(20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher.temperature": 0.3}, "uniform collapse"),
        ({"optim.lr": 0.05}, "AdamW"),
        ({"model.arch": "vit_base"}, "fixed_norm"),
        ({"teacher.kind": "student_copy"}, "teacher.kind student_copy with centering ends in coll"),
    ],
)
def test_settings_known_to_go_wrong_are_warned_of(settings: dict[str, Any], words: str) -> None:
    (warning,) = vit_s16().changed(settings).check()
    assert words in warning


def test_only_settings_of_the_execution_do_not_define_a_run() -> None:
    here = PretrainConfig().changed({"optim.lr": 1e-3, "execution.workers": 3}).defining()
    assert here == {**PretrainConfig().defining(), "optim.lr": 1e-3}


def test_former_names_of_settings_name_the_new_one() -> None:
    with pytest.raises(UserError, match=r"no setting 'model.width': it is called model.embed_dim"):
        demo().changed({"model.width": 96})


def test_former_options_name_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "demo", "--out", "run", "--model.width", "96"])
    assert "--model.width is called --model.embed-dim now" in capsys.readouterr().err
