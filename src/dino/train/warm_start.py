"""Continued pretraining: a run that starts from weights instead of random numbers.

The weights decide the architecture, the range and statistics of the pixels, and the head if they
hold one; the settings decide everything else. `config.json` records under `init` what came from
the weights, so that a resumed run does not read them again.
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
from dino.models.create import create, defaults
from dino.models.rope import PositionEncoding
from dino.settings import parsed, validated
from dino.train.config import OptimSettings, PretrainConfig, option
from dino.train.run_folder import read_config
from dino.weights.adapt import adapt_state_dict, for_channels
from dino.weights.checkpoint import Checkpoint, last_step
from dino.weights.files import file_hash
from dino.weights.load import load_strictly, read_checkpoint

HeadChoice = Literal["auto", "new"]

ADAPTED = {"model.position", "head.fixed_norm"}
"""Settings of networks that may differ from the weights."""
PARTS = ("registers", "layer_scale", "mlp", "key_bias")
"""Settings of ViTs that are not set unless a network has the part."""
WARM_UP = "1 epochs"
"""How long the backbone is frozen for a new head, unless the user sets it."""


@dataclass
class Initial:
    """Where a run starts.

    Attributes:
        weights: as the user named them.
        head: as the user chose: auto takes the head of the weights if they have one.
        file: the file that was read, and `sha256`: its hash.
        dialect: the layout of the file (`Checkpoint.dialect`).
        kept_head: whether the head comes from the weights.
        spec: the arguments of `dino.create` for the run's backbone.
        preprocessing: the transform of the run's backbone, as plain values.
        position: how the network of the weights resamples its position embedding.
        settings: the settings that come from the weights, by name.
        notes: sentences for the user.
        checkpoint: the tensors, until they are in the networks; None in a resumed run.
    """

    weights: str
    head: HeadChoice
    file: str
    sha256: str
    dialect: str
    kept_head: bool
    spec: dict[str, Any]
    preprocessing: dict[str, Any]
    position: PositionEncoding
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None

    def record(self) -> dict[str, Any]:
        """The entry `init` of `config.json`."""
        names = (field.name for field in fields(self))
        return {n: getattr(self, n) for n in names if n not in ("notes", "checkpoint")}

    def defining(self) -> dict[str, Any]:
        """What is compared when a run is resumed."""
        return {"init.from": self.weights, "init.head": self.head, "init.sha256": self.sha256}

    def backbone(self) -> Backbone:
        """The run's backbone, without the weights yet."""
        backbone = create(**self.spec)
        backbone.preprocessing = Preprocessing.from_dict(self.preprocessing)
        return backbone

    def fill(self, distillation: Distillation) -> None:
        """Put the weights into student, teacher and center.

        A file of one network is both student and teacher.

        Raises:
            UserError: naming keys and shapes that do not fit.
        """
        checkpoint = self.checkpoint
        assert checkpoint is not None, "a resumed run is filled from its checkpoint"
        student = checkpoint.student or checkpoint.teacher
        teacher = checkpoint.teacher or checkpoint.student
        for network, state in ((distillation.student, student), (distillation.teacher, teacher)):
            assert state is not None, "a checkpoint holds at least one network"
            backbone = adapt_state_dict(state.backbone, network.backbone, self.position)
            load_strictly(network.backbone, backbone, checkpoint.path)
            if self.kept_head and state.head is not None:
                load_strictly(network.head, state.head.tensors, checkpoint.path)
        centered = "center" in distillation.targets.state_dict()
        if self.kept_head and checkpoint.center is not None and centered:
            load_strictly(distillation.targets, {"center": checkpoint.center}, checkpoint.path)
        self.checkpoint = None


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
        run: the run folder; if it holds a checkpoint of a run that started from weights, `weights`
            is not read.
        given: names of the settings that the user chose one by one. Where they contradict the
            weights they are refused; all others come from the weights.
        head: auto takes the head of the weights if they have one, new trains a new one.

    Raises:
        UserError: if there are no such weights or they contradict `given`.
    """
    initial = _recorded(Path(run))
    if initial is None:
        initial = _read(config, weights, frozenset(given), head)
    else:  # another name or choice is refused by the loop, like every setting
        initial.weights, initial.head = str(weights), head
    settings = {name: value for name, value in initial.settings.items() if name not in given}
    return validated(config.changed(settings)).for_architecture(given), initial


def _recorded(run: Path) -> Initial | None:
    """The record of a run that is resumed; None for another run."""
    path = run / "config.json"
    if not path.exists() or last_step(run / "checkpoints") is None:
        return None
    record = read_config(path).get("init")
    if record is None:
        return None
    return parsed(Initial, record, path)


def _read(
    config: PretrainConfig, weights: str | Path, given: frozenset[str], head: HeadChoice
) -> Initial:
    heads = config.model.heads if "model.heads" in given else None
    checkpoint = read_checkpoint(weights, heads=heads)
    implied = defaults(checkpoint.spec["arch"])
    full = {**implied, **checkpoint.spec}
    names = ("arch", "patch_size", "stem", "position", "embed_dim", "depth", "heads")
    networks = {f"model.{name}": full.get(name) for name in names}
    networks |= {f"model.{name}": checkpoint.spec.get(name) for name in PARTS}
    head_settings = {} if head == "new" else _head_settings(checkpoint)
    networks |= head_settings
    requested = {
        name: implied.get(key) if value is None and key not in PARTS else value
        for name, value in config.flat().items()
        for key in (name.removeprefix("model."),)
    }
    position = "model.position"
    kinds = {networks[position], requested[position]}
    if position in given and "rope" in kinds and len(kinds) > 1:
        raise UserError(
            f"{checkpoint.path} has {position} {networks[position]}, which cannot become "
            f"{requested[position]}: leave out {option(position)}"
        )
    for name, value in networks.items():
        if name in given - ADAPTED and value != requested[name]:
            head_advice = "train a new head with --init-head new"
            advice = head_advice if name in head_settings else "start from other weights"
            raise UserError(
                f"{checkpoint.path} has {name} {value}, not {requested[name]}: leave out "
                f"{option(name)}, or {advice}"
            )
    settings = {**networks, **_pixel_settings(config, checkpoint, given)}
    if not head_settings and config.optim.freeze_backbone == OptimSettings().freeze_backbone:
        settings["optim.freeze_backbone"] = WARM_UP
    settings = {name: value for name, value in settings.items() if name not in given}
    changed = config.changed(settings)
    size, transform = changed.views.global_size, checkpoint.preprocessing
    resize = round(transform.resize * size / transform.crop)
    transform = replace(transform, resize=resize, crop=size, **changed.pixels.transform)
    spec = {**checkpoint.spec, "channels": changed.pixels.channels}
    if "position" in full:  # other networks stay at the image size of the weights
        spec |= {"position": changed.model.position, "image_size": size}
    initial = Initial(
        weights=str(weights),
        head=head,
        file=str(checkpoint.path.resolve()),
        sha256=file_hash(checkpoint.path),
        dialect=checkpoint.dialect,
        kept_head=bool(head_settings),
        spec=spec,
        preprocessing=transform.to_dict(),
        position=full.get("position", "reference"),
        settings=settings,
        checkpoint=checkpoint,
    )
    notes = _notes(initial, checkpoint, changed, requested)
    if "optim.lr" not in given and (lr := config.optim.lr) >= OptimSettings().lr:
        notes.append(
            f"warning: optim.lr {lr:g} is for training from scratch and may unlearn the weights: "
            f"start with --optim.lr {lr / 10:g}"
        )
    initial.notes = (*notes, *checkpoint.notes)
    return initial


def _pixel_settings(
    config: PretrainConfig, checkpoint: Checkpoint, given: frozenset[str]
) -> dict[str, Any]:
    channels, transform = checkpoint.spec.get("channels", 3), checkpoint.preprocessing
    if "pixels.channels" in given and config.pixels.channels != channels:
        channels = config.pixels.channels
        transform = for_channels(transform, channels)
    found = {"channels": channels, "mean": transform.mean, "std": transform.std}
    if given.isdisjoint({"pixels.low", "pixels.high"}):
        pixels = transform.pixels
        found |= {name: getattr(pixels, name) for name in ("low", "high", "page", "nodata")}
    return {f"pixels.{name}": value for name, value in found.items()}


def _head_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the weights' head; empty if they have none."""
    networks = [state for state in (checkpoint.student, checkpoint.teacher) if state is not None]
    if checkpoint.head_options is None or any(state.head is None for state in networks):
        return {}
    return {
        f"head.{name}": value
        for name, value in checkpoint.head_options.items()
        if value is not None or name == "bottleneck"  # None: a head without a bottleneck
    }


def _notes(
    initial: Initial, checkpoint: Checkpoint, config: PretrainConfig, requested: dict[str, Any]
) -> list[str]:
    both = checkpoint.student is not None and checkpoint.teacher is not None
    holds = ["student and teacher" if both else "one network as student and teacher"]
    holds += ["their head"] * initial.kept_head
    centered = initial.kept_head and config.teacher.targets == "centering"
    holds += ["center"] * (centered and checkpoint.center is not None)
    notes = [f"starts from {initial.weights} ({initial.dialect}): {', '.join(holds)}"]
    differing = [
        f"{name} {value}"
        for name, value in initial.settings.items()
        if value != requested[name] and not name.startswith("optim.")
    ]
    if differing:
        notes.append(f"settings of the weights, not of the recipe: {', '.join(differing)}")
    if centered and checkpoint.center is None:
        notes.append("the weights hold no center: it starts at 0 and settles in some 20 steps")
    if not initial.kept_head:
        frozen = config.optim.freeze_backbone
        notes.append(
            f"a new head: the backbone is frozen for {frozen} (--optim.freeze-backbone)"
            if in_steps(frozen, 100, 100)
            else "warning: a new head, and a backbone that is not frozen at the start, may unlearn "
            f"the weights: set --optim.freeze-backbone to about {WARM_UP!r}"
        )
    return notes
