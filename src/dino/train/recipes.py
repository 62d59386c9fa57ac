"""Recipes: functions that return the settings of a run.

The five of the paper (`vit_s16` to `resnet50`) are the published arguments of the released models
(their args.txt), which differ in places from the paper's prose; `vanilla` and `boost` are the
published README's. Accuracies are ImageNet top-1 in percent, k-NN / linear, and hours are the
sources'; nothing of them was run here. The releases took 64 V100 with 16 images each (`vit_s8`), 32
GPUs with 32 (`vit_b16`), 176 with 6 (`vit_b8`), 80 with 51 (`resnet50`). On 8 GPUs of one machine:

    torchrun --nproc_per_node 8 -m dino pretrain vit_s16 --data imagenet/train --out RUN
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import NoReturn

from dino.data.views.view_spec import ViewSettings
from dino.files import UserError
from dino.train.config import (
    ExecutionSettings,
    HeadSettings,
    ModelSettings,
    OptimSettings,
    PretrainConfig,
    RunSettings,
    TeacherSettings,
)

SMALL_VIEWS = ViewSettings(
    global_size=64,
    global_scale=(0.3, 1.0),
    local_count=4,
    local_size=32,
    local_scale=(0.05, 0.3),
    blur=(0.0, 0.0, 0.0),
    solarize=(0.0, 0.0, 0.0),
)
"""Multi-crop of `laptop` and `demo`: small images are not blurred."""


def vit_s16() -> PretrainConfig:
    """ViT-S/16, 800 epochs: 74.5 / 77.0 (paper Table 2).

    300 epochs took 72.6 hours on two machines of 8 V100 (Table 8), 800 hence about 8 days.
    """
    return PretrainConfig(
        head=HeadSettings(fixed_norm=False),
        optim=OptimSettings(lr_end=1e-5, clip=0.0),
        run=RunSettings(duration="800 epochs", batch=1024),
        execution=ExecutionSettings(precision="fp32"),
    )


def vit_s8() -> PretrainConfig:
    """ViT-S/8, 800 epochs: 78.3 / 79.7 (paper Table 2).

    Train in fp32: the authors saw instabilities with patches of 8 in mixed precision.
    """
    base = vit_s16()
    return replace(
        base,
        model=replace(base.model, patch_size=8),
        views=ViewSettings(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)),
        optim=OptimSettings(lr_end=1e-6, clip=3.0),
    )


def vit_b16() -> PretrainConfig:
    """ViT-B/16, 400 epochs: 76.1 / 78.2 (paper Table 2)."""
    return PretrainConfig(
        model=ModelSettings(arch="vit_base"),
        teacher=TeacherSettings(temperature_warmup="50 epochs"),
        optim=OptimSettings(lr=7.5e-4, lr_end=2e-6, clip=0.3, freeze_last_layer="3 epochs"),
        run=RunSettings(duration="400 epochs", batch=1024),
        execution=ExecutionSettings(precision="fp32"),
    )


def vit_b8() -> PretrainConfig:
    """ViT-B/8, 300 epochs: 77.4 / 80.1 (paper Table 2)."""
    base = vit_b16()
    return replace(
        base,
        model=replace(base.model, patch_size=8),
        teacher=replace(base.teacher, temperature_start=0.03),
        optim=replace(base.optim, lr=5e-4, clip=3.0),
        run=RunSettings(duration="300 epochs", batch=1056),
    )


def resnet50() -> PretrainConfig:
    """ResNet-50, 800 epochs: 67.5 / 75.3 (paper Table 2)."""
    return PretrainConfig(
        model=ModelSettings(
            arch="resnet50", patch_size=None, stem=None, position=None, drop_path=0.0
        ),
        head=HeadSettings(prototypes=60000, batch_norm=True),
        views=ViewSettings(global_scale=(0.14, 1.0), local_count=6, local_scale=(0.05, 0.14)),
        teacher=TeacherSettings(temperature_warmup="50 epochs"),
        optim=OptimSettings(
            optimizer="lars",
            lr=0.3,
            lr_end=0.0048,
            weight_decay=1e-6,
            weight_decay_end=1e-6,
            clip=0.0,
        ),
        run=RunSettings(duration="800 epochs", batch=4080),
        execution=ExecutionSettings(precision="fp32"),
    )


def vanilla() -> PretrainConfig:
    """ViT-S/16, 100 epochs: 69.3 / 74.0 (the published code's defaults).

    1.75 days on 8 V100, says the published README; it used fp16 where this uses bf16 on GPUs that
    have it.
    """
    return PretrainConfig(
        views=ViewSettings(global_scale=(0.4, 1.0), local_count=8, local_scale=(0.05, 0.4)),
        teacher=TeacherSettings(temperature=0.04, temperature_warmup="0 epochs"),
    )


def boost() -> PretrainConfig:
    """ViT-S/16, 300 epochs: 73.3 / 76.0 (published README).

    2.6 days on 16 V100. `vanilla` with batch 1024, free prototype norms and a teacher temperature
    that warms up to .07.
    """
    base = vanilla()
    return replace(
        base,
        head=HeadSettings(fixed_norm=False),
        teacher=TeacherSettings(),
        run=RunSettings(duration="300 epochs", batch=1024),
    )


def small_data() -> PretrainConfig:
    """ViT-S/16 for 5,000 to 500,000 images of your field on one GPU.

    `dino pretrain small_data --data photos/ --out RUN`. Few prototypes, a teacher that stays
    sharp, a fixed prototype norm and a long freeze are the authors' advice against collapse
    (docs/recipes.md). Hours depend on the data; accuracy was not measured on a GPU.
    """
    return PretrainConfig(
        head=HeadSettings(prototypes=4096),
        teacher=TeacherSettings(momentum=0.99, temperature=0.04, temperature_warmup="0 epochs"),
        views=ViewSettings(local_count=6),
        optim=OptimSettings(clip=1.0, freeze_last_layer="3 epochs"),
        run=RunSettings(duration="300 epochs", batch=256),
    )


def laptop() -> PretrainConfig:
    """ResNet-10 at 64 px for a few thousand images and some hours of two CPU cores.

    `dino pretrain laptop --data photos/ --out RUN`. Few prototypes and many steps of small
    batches; the trials that led to it are in docs/results.md.
    """
    return PretrainConfig(
        model=ModelSettings(
            arch="resnet10t", patch_size=None, stem=None, position=None, drop_path=0.0
        ),
        head=HeadSettings(prototypes=2048, hidden=1024, batch_norm=True),
        views=SMALL_VIEWS,
        teacher=TeacherSettings(
            momentum=0.99, momentum_end=0.999, temperature=0.04, temperature_warmup="0 epochs"
        ),
        optim=OptimSettings(lr=5e-3, warmup="1 epochs", weight_decay_end=0.1, clip=1.0),
        run=RunSettings(duration="20 epochs", batch=32),
        execution=ExecutionSettings(checkpoint_every="5%", knn_every="10%"),
    )


def demo() -> PretrainConfig:
    """A small ViT on the photographs of scikit-image and scikit-learn.

    `make demo`, or `dino pretrain demo --out RUN`; it takes minutes. Colours distinguish these
    photographs, so of the colour augmentations only mild brightness and contrast remain.
    """
    return PretrainConfig(
        model=ModelSettings(
            arch="vit_tiny", embed_dim=128, depth=4, heads=4, position="exact", drop_path=0.0
        ),
        head=HeadSettings(prototypes=512, hidden=512, bottleneck=128),
        views=replace(SMALL_VIEWS, brightness=0.3, contrast=0.3, saturation=0.0, hue=0.0, grey=0.0),
        teacher=TeacherSettings(
            momentum=0.994, momentum_end=0.998, temperature=0.04, temperature_warmup="0 epochs"
        ),
        optim=OptimSettings(lr=2e-3, warmup="10%", weight_decay_end=0.1, clip=1.0),
        run=RunSettings(duration="500 steps", batch=64),
        execution=ExecutionSettings(checkpoint_every="100 steps", workers=0),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        vit_s16,
        vit_s8,
        vit_b16,
        vit_b8,
        resnet50,
        vanilla,
        boost,
        small_data,
        laptop,
        demo,
    )
}


def summary(name: str) -> str:
    """The recipe called `name` in one line."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]


def recipe(name: str) -> PretrainConfig:
    """The settings of the recipe called `name`.

    Raises:
        UserError: for an unknown name, listing the known.
    """
    if name not in RECIPES:
        refuse(name)
    return RECIPES[name]()


def refuse(name: str, also: str = "") -> NoReturn:
    """Raise a `UserError` for an unknown recipe; `also` is another problem of its name."""
    near = " or ".join(get_close_matches(str(name), RECIPES, n=2, cutoff=0.65))
    advice = f"did you mean {near}?" if near else f"known are {', '.join(RECIPES)}{also}"
    raise UserError(f"unknown recipe {name!r}: {advice}")
