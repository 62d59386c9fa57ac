"""The settings of a pretraining run, as typed dataclasses; durations are text such as "100 epochs".

No network library is imported here, so that the command line can be built in a moment. What
defines the training (`model` to `run`) is compared when a run is resumed; `execution` may change
at any time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal

import tyro

from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD, NoData, PixelFormat
from dino.data.views.view_spec import ViewSettings
from dino.distillation.schedules import Schedules, TeacherKind, in_steps
from dino.files import UserError
from dino.settings import Form, Range, validated

Size = Annotated[int, Range(low=1, high=10**9)]
Number = Annotated[int, Range(low=1, high=1000)]
Share = Annotated[float, Range(low=0, high=1), tyro.conf.arg(metavar="SHARE")]
Rate = Annotated[float, Range(low=0, high=1000), tyro.conf.arg(metavar="RATE")]
Temperature = Annotated[float, Range(above=0), tyro.conf.arg(metavar="TEMPERATURE")]
Sharpness = Annotated[float, Range(low=0), tyro.conf.arg(metavar="TEMPERATURE")]
Duration = Annotated[
    str,
    Form(
        r"\s*[0-9]{0,12}\.?[0-9]{1,12}\s*(steps?|epochs?|%|percent)\s*",
        "a duration: a number of epochs, steps or %, such as '10 epochs'",
    ),
    tyro.conf.arg(metavar="DURATION"),
]
Length = Annotated[
    str,
    Form(
        r"\s*[0-9]{0,12}\.?[0-9]{1,12}\s*(steps?|epochs?|hours?|minutes?)\s*",
        "a number of epochs, steps, hours or minutes, such as '10 epochs' or '2 hours'",
    ),
    tyro.conf.arg(metavar="DURATION"),
]
RENAMED = {"model.width": "model.embed_dim"}
"""Former names of settings."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The backbone."""

    arch: Annotated[str, tyro.conf.arg(metavar="NAME")] = "vit_small"
    """vit_tiny, vit_small, vit_base, vit_large, vit_giant, resnet10t, resnet18, resnet50,
    convnext_tiny, convnext_small, convnext_base, convnext_large or timm:NAME."""
    patch_size: Size | None = 16
    """Pixels a side of a patch (ViTs only)."""
    stem: Literal["patch", "conv", "resnet"] | None = "patch"
    """From pixels to tokens: the paper's linear layer, 3x3 convolutions, or the stages of a
    ResNet-10 (ViTs only)."""
    position: Literal["reference", "exact", "antialias", "rope"] | None = "reference"
    """How position embeddings are resampled: as the published code does, exactly, or antialiased;
    rope for rotary positions in their place, as DINOv3 (ViTs only)."""
    embed_dim: Size | None = None
    """Another embedding dimension than the architecture's (ViTs only)."""
    depth: Number | None = None
    """Another number of blocks than the architecture's (ViTs only)."""
    heads: Size | None = None
    """Another number of attention heads than the architecture's (ViTs only)."""
    registers: Size | None = None
    """Number of learned tokens beside CLS and the patches (ViTs only)."""
    layer_scale: Annotated[float, Range(above=0)] | None = None
    """First value of a factor for each channel of every residual branch, such as 1e-5 (ViTs
    only)."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """The MLP of a block: gelu if not set, or swiglu with half more parameters (ViTs only)."""
    key_bias: bool | None = None
    """Whether keys have a bias: yes if not set; DINOv3's have none (ViTs only)."""
    drop_path: Annotated[float, Range(low=0, below=1)] = 0.1
    """Drop-path rate of the student's last block (ViTs only)."""
    token_dropout: Annotated[float, Range(low=0, below=1)] = 0.0
    """Share of the patches that the student's global views lack at the start; none from three
    quarters of the run on; not in the paper (ViTs only)."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """The projection head (paper section 3.1, appendix C)."""

    prototypes: Size = 65536
    """K, the output dimension."""
    hidden: Size = 2048
    """Width of the MLP's hidden layers."""
    bottleneck: Size | None = 256
    """Width of the l2-normalised bottleneck; None for none."""
    layers: Number = 3
    """Linear layers before the prototypes."""
    batch_norm: bool = False
    """Batch norm in the MLP (the paper's ResNet-50 only)."""
    fixed_norm: bool = True
    """Fix the prototypes' norm at 1; only ViT-S is known to do well without."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of the MLP."""
    predictor: bool = False
    """BYOL's predictor behind the student's projection (section 5.1); with the head's batch norm
    it has one too."""


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """What the images hold (`dino data stats` measures all of it: --stats FILE)."""

    channels: Annotated[Size, tyro.conf.arg(aliases=["--channels"])] = 3
    """C; with others than 3, saturation, hue and grey are switched off."""
    page: Annotated[Annotated[int, Range(low=0)] | None, tyro.conf.arg(aliases=["--page"])] = None
    """Page of multi-page TIFFs, frame of DICOMs, from 0; the first of C where pages are grey."""
    low: tuple[float, ...] | None = None
    """Value that becomes 0, for each channel or one for all; None for what the type offers."""
    high: tuple[float, ...] | None = None
    """Value that becomes 255."""
    nodata: NoData = None
    """Value of pixels without data (always NaN), which get the mean; None for what files say."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, of pixels in [0, 1]."""
    std: Annotated[tuple[float, ...], Range(above=0)] = IMAGENET_STD
    """Standard deviation of each channel."""

    @property
    def format(self) -> PixelFormat:
        """What to expect of an image.

        Raises:
            UserError: for statistics of another number of channels.
        """
        if not self.channels == len(self.mean) == len(self.std):
            raise UserError(
                f"{self.channels} channels need as many means and deviations: measure them with "
                f"'dino data stats PATH --channels {self.channels} --out stats.json' and "
                "give --stats stats.json"
            )
        return PixelFormat(self.channels, self.page, self.low, self.high, self.nodata)

    @property
    def transform(self) -> dict[str, Any]:
        """What these settings decide of a `Preprocessing`, by its fields."""
        return {"mean": self.mean, "std": self.std, "pixels": self.format}


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Targets and the momentum teacher (paper section 3.1)."""

    kind: TeacherKind = "momentum"
    """The student's moving average, the student of the previous iteration or of the end of the
    previous epoch, or a copy of it (section 5.2, Fig. 6)."""
    momentum: Share = 0.996
    """EMA momentum at the start; higher (.9995) for small batches, lower (.99) for few steps."""
    momentum_end: Share = 1.0
    """EMA momentum at the end (cosine)."""
    targets: Literal["centering", "sinkhorn", "batch_softmax", "none"] = "centering"
    """From the teacher's logits to targets: centering, SwAV's Sinkhorn-Knopp, softmax over the
    batch (appendix B, Table 15), or the softmax alone."""
    center_momentum: Share = 0.9
    """m of equation 4."""
    student_temperature: Temperature = 0.1
    """tau_s."""
    temperature: Sharpness = 0.07
    """tau_t after its warm-up; lower is sharper and safer (0: the largest logit alone), above .07
    is unstable."""
    temperature_start: Sharpness = 0.04
    """tau_t of the first epoch."""
    temperature_warmup: Duration = "30 epochs"
    """How long tau_t takes to get there."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The student's optimizer."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD or LARS for convnets."""
    lr: Rate = 5e-4
    """Peak learning rate for 256 images a batch; scaled linearly with the batch."""
    lr_end: Rate = 1e-6
    """Learning rate at the end (cosine); used as it is, not scaled."""
    warmup: Duration = "10 epochs"
    """Linear warm-up of the learning rate from 0."""
    weight_decay: Rate = 0.04
    """Weight decay at the start."""
    weight_decay_end: Rate = 0.4
    """Weight decay at the end (cosine)."""
    clip: Annotated[float, Range(low=0)] = 3.0
    """Largest l2 norm of each gradient tensor; 0 for no clipping."""
    loss: Literal["cross_entropy", "mse", "contrastive"] = "cross_entropy"
    """Cross-entropy (equation 2); MSE of l2-normalised outputs without sharpening (appendix B), or
    MoCo's InfoNCE with a queue, whose temperature is teacher.student_temperature (section 5.1)."""
    queue: Size = 65536
    """Negatives of the contrastive loss (MoCo-v2's)."""
    koleo: Share = 0.0
    """Weight of the KoLeo term, which spreads the features (DINOv2's is .1); not in the paper."""
    freeze_last_layer: Duration = "1 epochs"
    """How long the prototypes are frozen at the start; raise it if the loss does not go down."""
    freeze_backbone: Duration = "0 epochs"
    """How long the backbone is frozen at the start, while a new head is warmed up; with --init-from
    a file without a head it is 1 epoch."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long, on how many images at a time, with which random numbers."""

    duration: Length = "100 epochs"
    """In epochs or steps; or in hours or minutes, in which case the number of steps is fitted to
    the time while the run goes on, so that its schedules end with it."""
    batch: Size = 512
    """Images a step, over all processes."""
    seed: Annotated[int, Range(low=0, below=2**63)] = 0
    """Of everything that is drawn."""


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How the training is carried out: none of it defines the result, all may change later."""

    micro_batch: Size | None = None
    """Images of one process that go through the networks at a time: less memory, same result."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast (head, loss and center stay in fp32) or fp32; auto: bf16 where a
    GPU or a CPU (AVX512-BF16, AMX) has it."""
    workers: Annotated[int, Range(low=0, high=1000)] | None = None
    """Processes that read and crop images; by default the cores there are, less one, at most 16."""
    log_every: Duration = "10 steps"
    """How often a line of metrics is written."""
    checkpoint_every: Duration = "1 epochs"
    """How often everything is saved."""
    keep: Number = 2
    """How many of the newest checkpoints stay."""
    keep_every: Duration = "0 steps"
    """Checkpoints at multiples of this stay as well; "0 steps" for none."""
    knn_every: Duration = "10%"
    """How often k-NN is measured, if there are labels; "0 steps" for never."""
    max_refused: Size = 20
    """Stop after that many steps in a row whose loss or gradients were not finite."""
    max_skipped: Share = 0.01
    """Stop if a larger share of the images cannot be used for one and the same kind of reason."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases, as its variables say (WANDB_PROJECT, WANDB_MODE, ...)."""
    mlflow: bool = False
    """Also log to MLflow, as its variables say (MLFLOW_TRACKING_URI, ...)."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that defines a pretraining run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    pixels: PixelSettings = field(default_factory=PixelSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)

    def changed(self, settings: dict[str, Any]) -> PretrainConfig:
        """A copy with some settings changed.

        Args:
            settings: for example `{"optim.lr": 1e-3, "run.batch": 64}`.

        Raises:
            UserError: for a name that does not exist.
        """
        config, known = self, self.flat()
        for name, value in settings.items():
            if name not in known:
                raise UserError(f"there is no setting {name!r}: {_advice(name, list(known))}")
            section, _, key = name.partition(".")
            group = replace(getattr(config, section), **{key: value})
            config = replace(config, **{section: group})
        return config

    def flat(self) -> dict[str, Any]:
        """Every setting by its name: {"optim.lr": 0.0005, ...}."""
        return {
            f"{section}.{key}": value
            for section, settings in asdict(self).items()
            for key, value in settings.items()
        }

    def defining(self) -> dict[str, Any]:
        """The settings that define the result, by name, as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.flat().items()
            if not name.startswith("execution.")
        }

    def for_architecture(self, given: Collection[str] = ()) -> PretrainConfig:
        """A copy without the settings that the architecture does not have.

        Args:
            given: names of the settings that the user chose one by one; these are not dropped.

        Raises:
            UserError: for an unknown architecture, or one that lacks a setting of `given`.
        """
        from dino.models.create import architecture, defaults

        arch = self.model.arch
        student = ("drop_path", "token_dropout")
        has = {"arch", *defaults(arch), *(student if architecture(arch)[0].has_drop_path else ())}
        dropped = {}
        for setting in (one.name for one in fields(ModelSettings) if one.name not in has):
            name, off = f"model.{setting}", 0.0 if setting in student else None
            if name in given and getattr(self.model, setting) != off:
                raise UserError(f"{arch} has no {setting} to set: leave out {option(name)}")
            dropped[name] = off
        return self.changed(dropped)

    def check(self) -> list[str]:
        """Refuse what cannot work, before anything is read or built.

        Returns:
            Warnings: sentences about settings that are known to go wrong.

        Raises:
            UserError: with the setting to change.
        """
        from dino.models.create import defaults  # imports torch, which `--help` can do without

        validated(self)
        batch, model = self.run.batch, self.model
        _ = self.pixels.format
        self.views.specs()
        if "patch_size" in defaults(model.arch) and (patch := model.patch_size) is not None:
            for name in ("global_size", "local_size"):
                if (size := getattr(self.views, name)) % patch:
                    near = [n for n in (size // patch * patch, -(-size // patch) * patch) if n]
                    raise UserError(
                        f"views.{name} {size} is not a multiple of the patch size {patch}: take "
                        f"{' or '.join(map(str, near))}, or another model.patch_size"
                    )
        teacher = self.teacher
        coldest = min(teacher.temperature, teacher.temperature_start)
        if coldest == 0 and teacher.targets in ("sinkhorn", "batch_softmax"):
            raise UserError(
                f"teacher.targets {teacher.targets} divides by the teacher's temperature: take "
                "teacher.temperature and teacher.temperature_start above 0"
            )
        allowed = {"mse": ("centering", "none"), "contrastive": ("none",)}
        if teacher.targets not in (fits := allowed.get(self.optim.loss, (teacher.targets,))):
            raise UserError(
                f"optim.loss {self.optim.loss} compares vectors, not distributions: take "
                f"teacher.targets {' or '.join(fits)}"
            )
        distributions = self.optim.loss == "cross_entropy"
        if self.head.predictor and self.head.bottleneck is None and distributions:
            raise UserError(
                "head.predictor maps the bottleneck before the prototypes: set head.bottleneck, "
                "or another optim.loss"
            )
        lr = max(self.optim.lr * batch / 256, self.optim.lr_end)
        shrinking = lr * max(self.optim.weight_decay, self.optim.weight_decay_end)
        if self.optim.optimizer != "lars" and shrinking >= 1:
            raise UserError(
                f"a learning rate of {lr:g} (optim.lr scaled to the batch) times "
                f"optim.weight_decay is {shrinking:g}, which overshoots 0 at 1: lower one of them"
            )
        warnings = []
        hottest = max(teacher.temperature, teacher.temperature_start)
        if hottest > 0.07:
            warnings.append(
                f"a teacher temperature of {hottest} is above .07, where training is known to end "
                "in uniform collapse: to sharpen the targets, lower it"
            )
        if teacher.kind in ("previous_iteration", "student_copy") and (
            teacher.targets == "centering"
        ):
            warnings.append(
                f"teacher.kind {teacher.kind} with centering ends in collapse (paper Fig. 6, "
                "Table 15): take --teacher.targets sinkhorn or --teacher.kind momentum"
            )
        if self.optim.optimizer == "adamw" and self.optim.lr > 5e-3:
            warnings.append(
                f"optim.lr {self.optim.lr} per 256 images is far above what AdamW trains with "
                "(about 5e-4)"
            )
        if not self.head.fixed_norm and model.arch != "vit_small":
            warnings.append("head.fixed_norm off is only known to be safe for vit_small")
        return warnings

    def schedules(self, steps_per_epoch: int, total: int | None = None) -> Schedules:
        """Every schedule, resolved to steps.

        Args:
            steps_per_epoch: of one pass over the images.
            total: steps of a run whose duration is a time.

        Raises:
            UserError: for a run without steps, or warm-ups that are too long for it.
        """
        total = in_steps(self.run.duration, steps_per_epoch) if total is None else total
        if total < 1:
            raise UserError(f"run.duration {self.run.duration!r} has no step: make it longer")
        optim, teacher = self.optim, self.teacher
        steps = partial(in_steps, steps_per_epoch=steps_per_epoch, total=total)
        for name, span, most in (
            ("optim.warmup", optim.warmup, total),
            ("teacher.temperature_warmup", teacher.temperature_warmup, total),
            ("optim.freeze_backbone", optim.freeze_backbone, total - 1),
        ):
            if steps(span) > most:
                raise UserError(
                    f"{name} {span!r} is too long for run.duration {self.run.duration!r}: shorten "
                    f"it, for example {option(name)} 10%, or lengthen the run"
                )
        return Schedules(
            total=total,
            steps_per_epoch=steps_per_epoch,
            warmup=steps(optim.warmup),
            lr=optim.lr * self.run.batch / 256,
            lr_end=optim.lr_end,
            weight_decay=optim.weight_decay,
            weight_decay_end=optim.weight_decay_end,
            momentum=teacher.momentum,
            momentum_end=teacher.momentum_end,
            temperature_start=teacher.temperature_start,
            temperature=teacher.temperature,
            temperature_epochs=round(steps(teacher.temperature_warmup) / steps_per_epoch),
            freeze_steps=steps(optim.freeze_last_layer),
            backbone_freeze_steps=steps(optim.freeze_backbone),
            token_dropout=self.model.token_dropout,
            teacher=teacher.kind,
        )


def _advice(name: str, known: list[str]) -> str:
    """What to write in place of a name that is no setting."""
    if name in RENAMED:
        return f"it is called {RENAMED[name]} now"
    if inside := [one for one in known if one.startswith(f"{name}.")]:
        return f"it is a group of settings: name one of them, such as {inside[0]}"
    section, _, key = name.rpartition(".")
    keys = {one: one.partition(".")[2] for one in known if one.startswith(f"{section}.")}
    keys = keys or {one: one.partition(".")[2] for one in known}
    near = get_close_matches(key, keys.values(), n=1)
    similar = [one for one, its_key in keys.items() if its_key in near]
    return f"did you mean {' or '.join(similar)}?" if similar else "see dino pretrain --help"


def setting_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that may be named as on the command line: `--optim.lr-end` is `optim.lr_end`.

    Raises:
        UserError: if two names mean the same setting.
    """
    named = {name.lstrip("-").replace("-", "_"): value for name, value in settings.items()}
    if len(named) < len(settings):
        raise UserError(f"settings names one setting twice: {', '.join(settings)}")
    return named


def option(name: str) -> str:
    """The option of the command line for a setting: "--optim.lr-end" for "optim.lr_end"."""
    return f"--{name.replace('_', '-')}"
