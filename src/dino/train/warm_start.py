"""Continued pretraining: a run that starts from weights instead of random numbers.

The weights decide the architecture, the head if they hold one, and what pixels mean; the settings
say everything else. What was taken from them stands in `config.json` under `init`, so that a
resumed run does not read them again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dino.data.images.preprocessing import Preprocessing
from dino.distillation.schedules import in_steps
from dino.distillation.step import Distillation
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.create import architecture, create, defaults
from dino.models.position_embedding import Position
from dino.settings import parsed
from dino.train.config import OptimSettings, PretrainConfig
from dino.train.run_folder import read_config
from dino.weights.adapt import adapt_state_dict, channel_statistics
from dino.weights.checkpoint import Checkpoint
from dino.weights.files import file_hash
from dino.weights.load import load_strictly, read_checkpoint

HeadChoice = Literal["auto", "new"]

SIZES_OF_A_NETWORK = ("arch", "patch_size", "embed_dim", "depth", "heads")
WARM_UP = "1 epochs"
"""How long the backbone waits for a new head, unless the user says it."""


@dataclass
class Initial:
    """Where a run starts.

    Attributes:
        weights: as the user named them.
        head: as the user chose: auto takes the head along if there is one.
        file: the file that was read, and `sha256`: its hash.
        dialect: whose file it is.
        kept_head: whether its head was taken along.
        spec: the arguments of `dino.create` for the run's backbone.
        preprocessing: the transform of the run's backbone, as plain values.
        position: how the weights' own network resamples its position embedding.
        settings: the settings that come from the weights, by name.
        notes: sentences for the user.
        parts: the tensors, until they have been put into the networks; None on being resumed.
    """

    weights: str
    head: HeadChoice
    file: str
    sha256: str
    dialect: str
    kept_head: bool
    spec: dict[str, Any]
    preprocessing: dict[str, Any]
    position: Position
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    parts: Checkpoint | None = None

    def record(self) -> dict[str, Any]:
        """What `config.json` keeps."""
        kept = (field.name for field in fields(self) if field.name not in ("notes", "parts"))
        return {name: getattr(self, name) for name in kept}

    def defining(self) -> dict[str, Any]:
        """What is compared when a run is resumed."""
        return {"init.from": self.weights, "init.head": self.head, "init.sha256": self.sha256}

    def backbone(self) -> Backbone:
        """The run's backbone, not filled yet."""
        backbone = create(**self.spec)
        backbone.preprocessing = Preprocessing.from_dict(self.preprocessing)
        return backbone

    def fill(self, distillation: Distillation) -> None:
        """Put the weights into student, teacher and center.

        A file of one network is both student and teacher.

        Raises:
            UserError: naming keys and shapes that do not fit.
        """
        parts = self.parts
        assert parts is not None, "a resumed run is filled from its checkpoint"
        student, teacher = parts.student or parts.teacher, parts.teacher or parts.student
        for network, part in ((distillation.student, student), (distillation.teacher, teacher)):
            assert part is not None, "a checkpoint holds at least one network"
            backbone = adapt_state_dict(part.backbone, network.backbone, self.position)
            load_strictly(network.backbone, backbone, parts.path)
            if self.kept_head and part.head is not None:
                load_strictly(network.head, part.head.tensors, parts.path)
        if self.kept_head and parts.center is not None:
            load_strictly(distillation.targets, {"center": parts.center}, parts.path)
        self.parts = None


def begin(
    config: PretrainConfig,
    weights: str | Path,
    run: str | Path,
    *,
    given: Collection[str] = (),
    head: HeadChoice = "auto",
) -> tuple[PretrainConfig, Initial]:
    """The settings of a run that starts from weights, and what it starts from.

    Args:
        config: the settings, as if nothing was known of the weights.
        weights: whatever `dino.load` takes; of a run folder, its last checkpoint.
        run: the run folder; if it holds a checkpoint that began in this way, `weights` is not read.
        given: names of the settings that the user chose one by one. Where they contradict the
            weights they are refused; all others follow the weights.
        head: auto takes the head along if the weights have one, new trains a new one.

    Raises:
        UserError: if there are no such weights or they contradict what was given.
    """
    initial = _recorded(Path(run))
    if initial is None:
        initial = _read(config, weights, frozenset(given), head)
    else:  # another name or choice is refused by the loop, like every setting
        initial.weights, initial.head = str(weights), head
    taken = {name: value for name, value in initial.settings.items() if name not in given}
    return config.changed(taken), initial


def _recorded(run: Path) -> Initial | None:
    path = run / "config.json"
    if not path.exists() or not (run / "checkpoints" / "LAST").exists():
        return None
    record = read_config(path).get("init")
    if record is None:
        return None
    initial = parsed(Initial, record, path)
    pairs = initial.settings.items()
    initial.settings = {name: tuple(v) if isinstance(v, list) else v for name, v in pairs}
    file = Path(initial.file)
    if file.exists() and file_hash(file) != initial.sha256:
        initial.notes = (f"{file} has changed since: this run goes on from its own checkpoint",)
    return initial


def _read(
    config: PretrainConfig, weights: str | Path, given: frozenset[str], head: HeadChoice
) -> Initial:
    heads = config.model.heads if "model.heads" in given else None
    parts = read_checkpoint(weights, heads=heads)
    own_head = None if head == "new" else _own_head(config, parts, given)
    taken = {
        **_model_settings(config, parts, given),
        **_pixel_settings(config, parts, given),
        **(own_head or _warm_up(config)),
    }
    taken = {name: value for name, value in taken.items() if name not in given}
    changed = config.changed(taken)
    spec = _spec(changed, parts.spec)
    initial = Initial(
        weights=str(weights),
        head=head,
        file=str(parts.path.resolve()),
        sha256=file_hash(parts.path),
        dialect=parts.dialect,
        kept_head=own_head is not None,
        spec=spec,
        preprocessing=_preprocessing(changed, parts.preprocessing).to_dict(),
        position=_whole(parts.spec).get("position", "reference"),
        settings=taken,
        parts=parts,
    )
    initial.notes = (
        *_notes(initial, parts, config, changed),
        *parts.notes,
        *_doubt(config, given),
    )
    return initial


# ------------------------------------------------------------------------------------ what is taken
def _whole(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec with what the architecture's name implies."""
    return {**defaults(spec["arch"]), **spec}


def _model_settings(
    config: PretrainConfig, parts: Checkpoint, given: frozenset[str]
) -> dict[str, Any]:
    """The architecture, which nothing can change."""
    own, implied = _whole(parts.spec), architecture(parts.spec["arch"])[1]
    for name in (*SIZES_OF_A_NETWORK, *(() if "position" in own else ("position",))):
        asked = getattr(config.model, name) or implied.get(name)
        if f"model.{name}" in given and asked != own.get(name):
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"{parts.path} is a network with {name} {own.get(name)} and cannot become one with "
                f"{asked}: leave out {flag}, or begin with other weights"
            )
    taken = {name: parts.spec.get(name) for name in SIZES_OF_A_NETWORK}
    taken |= {"patch_size": own.get("patch_size"), "position": own.get("position")}
    if not architecture(own["arch"])[0].has_drop_path:
        taken["drop_path"] = 0.0
    return {f"model.{name}": value for name, value in taken.items()}


def _pixel_settings(
    config: PretrainConfig, parts: Checkpoint, given: frozenset[str]
) -> dict[str, Any]:
    """Mean, deviation and range of the images that the weights know."""
    old, own = parts.preprocessing, parts.spec.get("channels", 3)
    channels = config.pixels.channels if "pixels.channels" in given else own
    taken: dict[str, Any] = {"channels": channels, "mean": old.mean, "std": old.std}
    if channels != own:
        taken |= {
            "mean": channel_statistics(old.mean, channels),
            "std": channel_statistics(old.std, channels),
        }
    elif given.isdisjoint({"pixels.low", "pixels.high"}):
        taken |= {"low": old.pixels.low, "high": old.pixels.high, "page": old.pixels.page}
    return {f"pixels.{name}": value for name, value in taken.items()}


def _own_head(
    config: PretrainConfig, parts: Checkpoint, given: frozenset[str]
) -> dict[str, Any] | None:
    """The settings of the weights' own head; None if they have none."""
    networks = [part for part in (parts.student, parts.teacher) if part is not None]
    if parts.head_options is None or any(part.head is None for part in networks):
        return None
    options = {name: value for name, value in parts.head_options.items() if value is not None}
    options["bottleneck"] = parts.head_options["bottleneck"]  # None means that it has none
    for name, value in options.items():
        asked = getattr(config.head, name)
        if name != "fixed_norm" and f"head.{name}" in given and asked != value:
            flag = f"--head.{name.replace('_', '-')}"
            raise UserError(
                f"the head in {parts.path} has {name} {value}, not {asked}: leave out {flag}, or "
                "train a new head with --init-head new"
            )
    return {f"head.{name}": value for name, value in options.items()}


def _warm_up(config: PretrainConfig) -> dict[str, Any]:
    """A new head comes to fit the backbone before the backbone follows it."""
    usual = config.optim.freeze_backbone == OptimSettings().freeze_backbone
    return {"optim.freeze_backbone": WARM_UP} if usual else {}


def _spec(config: PretrainConfig, own: dict[str, Any]) -> dict[str, Any]:
    spec = {**own, "channels": config.pixels.channels}
    if "position" in defaults(own["arch"]):  # others keep their size
        spec |= {"position": config.model.position, "image_size": config.views.global_size}
    return spec


def _preprocessing(config: PretrainConfig, own: Preprocessing) -> Preprocessing:
    """The weights' own transform, at the run's size."""
    size = config.views.global_size
    return replace(
        own,
        resize=round(own.resize * size / own.crop),
        crop=size,
        mean=config.pixels.mean,
        std=config.pixels.std,
        pixels=config.pixels.format,
    )


# ------------------------------------------------------------------------------------ words
def _notes(
    initial: Initial, parts: Checkpoint, before: PretrainConfig, after: PretrainConfig
) -> list[str]:
    both = parts.student is not None and parts.teacher is not None
    holds = ["student and teacher" if both else "one network as student and teacher"]
    holds += ["their head"] * initial.kept_head
    holds += ["center"] * (initial.kept_head and parts.center is not None)
    notes = [f"begins with {initial.weights} ({initial.dialect}): {', '.join(holds)}"]
    own = {f"model.{name}": value for name, value in _whole(initial.spec).items()}
    differing = [
        f"{name} {own.get(name, value)}"
        for name, value in initial.settings.items()
        if not name.startswith("optim.") and value != _setting(before, name)
    ]
    if differing:
        notes.append(f"as the weights say, not as the recipe does: {', '.join(differing)}")
    return notes + _conversions(initial, parts, after)


def _conversions(initial: Initial, parts: Checkpoint, config: PretrainConfig) -> list[str]:
    notes = []
    channels = parts.spec.get("channels", 3)
    if channels != config.pixels.channels:
        notes.append(
            f"first layer: weights for {channels} channels spread over {config.pixels.channels}"
        )
    if (patch := _whole(initial.spec).get("patch_size")) is not None:
        old, new = parts.spec.get("image_size", 224) // patch, config.views.global_size // patch
        if old != new:
            notes.append(
                f"position embedding: resampled from {old} x {old} patches to {new} x {new}"
            )
    if initial.kept_head and parts.center is None:
        notes.append("the weights hold no center: it begins at 0 and settles in some 20 steps")
    if not initial.kept_head:
        frozen = config.optim.freeze_backbone
        notes.append(
            f"a new head: the backbone waits {frozen} for it (--optim.freeze-backbone)"
            if in_steps(frozen, 100, 100)
            else "warning: a new head and a backbone that follows it from the first step: it will "
            f"unlearn, unless --optim.freeze-backbone is about {WARM_UP!r}"
        )
    return notes


def _setting(config: PretrainConfig, name: str) -> Any:
    part, _, key = name.partition(".")
    return getattr(getattr(config, part), key)


def _doubt(config: PretrainConfig, given: frozenset[str]) -> list[str]:
    usual = OptimSettings().lr
    if "optim.lr" in given or config.optim.lr < usual:
        return []
    return [
        f"warning: optim.lr {config.optim.lr:g} is for training from scratch and may unlearn the "
        f"weights: begin with --optim.lr {config.optim.lr / 10:g}"
    ]
