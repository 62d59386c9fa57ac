"""What a checkpoint holds, whoever wrote it: student, teacher, heads and center under dino's names.

Readable are our run folders, their checkpoints and files, and the layouts of `key_maps`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.models.rope import BASE
from dino.weights.files import (
    Container,
    dino_metadata,
    file_hash,
    open_container,
    read_header,
    read_safetensors,
    regular_file,
    shown,
    state_dict,
)
from dino.weights.foreign_config import find_layout, hints_of, preprocessing_of, timm_config
from dino.weights.infer_spec import HeadState, head_of, spec_of, with_periods
from dino.weights.key_maps import to_dino
from dino.weights.prefixes import Part, backbone_and_head, by_role, first_of, parts, unwrapped
from dino.weights.safe_pickle import attributes

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which trainers write a network's tensors, the first choice first."""
CHOOSE = "`dino weights convert --network NAME` writes another one (in Python: network=)"
OF_PATCHES = ("last_layer2.", "mlp2.")
"""In iBOT's heads: the layers that patches go through in place of CLS."""
TRAINING = ("recipe", "step", "steps")
"""Entries of `Checkpoint.about` for the provenance of results."""


@dataclass(frozen=True)
class NetworkState:
    """One network of a checkpoint.

    Attributes:
        backbone: its state dict under dino's names.
        head: its projection head, if the checkpoint has it.
        notes: sentences on what was changed or ignored.
    """

    backbone: dict[str, Tensor]
    head: HeadState | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, ready for `dino.create(**spec)`.

    Attributes:
        path: the file it was read from (of several, the teacher's).
        dialect: dino, or one of `key_maps`.
        spec: the arguments of `dino.create`.
        preprocessing: the transform that belongs to the weights.
        teacher: the network that features are taken from, and that of "backbone only" files.
        student: the network that is trained.
        center: [K], subtracted from the teacher's logits; the published files of ResNet-50 and of
            single networks have none.
        head_options: arguments of `dino.models.head.Head` for the heads: those that tensors show,
            and `fixed_norm` and `activation` where the checkpoint states them. None without heads.
        about: the writer's description, in dino's files.
        notes: sentences on what was changed, ignored or assumed.
        warnings: those of `notes` that a wrong assumption could make wrong.
    """

    path: Path
    dialect: str
    spec: dict[str, Any]
    preprocessing: Preprocessing
    teacher: NetworkState | None = None
    student: NetworkState | None = None
    center: Tensor | None = None
    head_options: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def network(self, name: str) -> NetworkState:
        """The student for "student", else the teacher, which a named network of a file is too.

        Raises:
            UserError: if the checkpoint does not have it.
        """
        found, other = (self.student, "teacher") if name == "student" else (self.teacher, "student")
        if found is None:
            raise UserError(f"{self.path} holds no {name}, but a {other} (network={other})")
        return found

    def origin(self, name: str) -> dict[str, Any]:
        """For the provenance of results: dialect, which network, file and its SHA-256.

        Where the file states them also recipe, step and number of steps of the training.
        """
        path = self.path
        if name == "student" and (path.parent / "state.json").exists():
            path = path.with_name("student.safetensors")
        source = {"dialect": self.dialect, "network": name}
        training = {key: self.about[key] for key in TRAINING if key in self.about}
        return {**source, "file": path.name, "file_sha256": file_hash(path), **training}

    @property
    def step(self) -> int | None:
        """After how many steps of a run it was saved; None where nothing states it."""
        if self.path.with_name("state.json").exists():  # `about` is of the run's newest teacher
            digits = self.path.parent.name.removeprefix("step_")
            return int(digits) if digits.isdecimal() else None
        return self.about.get("step")

    def describe(self, name: str) -> list[str]:
        """The network, the dialect unless it is dino's, and the step, for `repr` of a network."""
        foreign = self.dialect != "dino"
        named = [name] if name != "teacher" or not foreign else []  # most foreign files have one
        kind = [f"{self.dialect} weights"] if foreign else []
        return [*named, *kind, *([] if self.step is None else [f"step {self.step}"])]


def read(path: Path, heads: int | None = None, network: str = "teacher") -> Checkpoint:
    """Read everything that a checkpoint holds.

    Args:
        path: a run folder, one of its checkpoints, the folder of a model of timm or transformers,
            or a file of weights.
        heads: attention heads of a ViT whose file does not state them.
        network: teacher or student, or one of several networks in a file by its key.

    Raises:
        UserError: if it is none of these, in one sentence.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "state.json").exists():
        return _run_checkpoint(folder, folder.parent.parent / "teacher.safetensors", network)
    if path.is_dir() and (path / "teacher.safetensors").exists():
        step, path = last_step(path / "checkpoints"), path / "teacher.safetensors"
        if step is not None:
            return _run_checkpoint(step, path, network)
    container = open_container(path)
    metadata = dino_metadata(container.metadata, container.path)
    if metadata is None:
        return _foreign(container, heads, network)
    _check_network(network)
    depth = metadata["spec"].get("depth", 0)
    if depth > len(container.content):  # building it would never end
        raise UserError(f"{container.path} holds too few tensors for {depth:,} blocks")
    teacher = NetworkState(container.content)
    return Checkpoint(container.path, "dino", **metadata, teacher=teacher)


# ------------------------------------------------------------------------------------ dino's runs
def last_step(checkpoints: Path) -> Path | None:
    """The checkpoint that the file LAST of a run's folder `checkpoints` names; None without LAST.

    Raises:
        UserError: if LAST does not hold the name of a complete checkpoint beside it.
    """
    pointer = checkpoints / "LAST"
    if not pointer.exists():
        return None
    name = regular_file(pointer).read_bytes()[:100].decode(errors="replace").strip()
    complete = sorted(path.parent.name for path in checkpoints.glob("step_*/state.json"))
    if name not in complete:
        raise UserError(
            f"{pointer} holds {name!r}, which is no checkpoint beside it: write "
            f"{complete[-1] if complete else 'the name of a step_... folder'} into it"
        )
    return checkpoints / name


def _check_network(name: str) -> None:
    if name not in ("teacher", "student"):
        raise UserError(f"network must be teacher or student for files of dino, not {name!r}")


def _run_checkpoint(step: Path, teacher: Path, network: str) -> Checkpoint:
    """A checkpoint of a run; the architecture stands in the run's `teacher.safetensors`."""
    _check_network(network)
    if not teacher.exists():
        raise UserError(f"{teacher} is missing, which names the architecture of {step.name}")
    metadata = dino_metadata(read_header(teacher), teacher)
    files = {name: step / f"{name}.safetensors" for name in ("teacher", "student", "loss")}
    absent = [path.name for path in files.values() if not path.exists()]
    if metadata is None or absent:
        missing = ", ".join(absent) or f"the architecture in {teacher}"
        raise UserError(f"{step} is no complete checkpoint of a run: {missing} is missing")
    state = read_json(step / "state.json")
    if isinstance(state, dict):  # the teacher beside the checkpoints may be of another step
        _check_hashes(files, state.get("sha256"))
        metadata["about"] |= {key: state[key] for key in ("step", "measured") if key in state}
    tensors = {name: read_safetensors(path)[0] for name, path in files.items()}
    config = teacher.parent / "config.json"
    content = read_json(config) if config.exists() else {}
    settings = content.get("defining", {}) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{config} is not the configuration of a run: restore it from a copy")
    stated = {name: settings.get(f"head.{name}") for name in ("fixed_norm", "activation")}
    states = {
        name: _network_state(*backbone_and_head(state_dict(tensors[name], step)))
        for name in ("teacher", "student")
    }
    return Checkpoint(
        files["teacher"],
        "dino",
        **metadata,
        teacher=states["teacher"],
        student=states["student"],
        center=tensors["loss"].get("center"),
        head_options=_head_options(states["student"], stated),
    )


def _check_hashes(files: Mapping[str, Path], hashes: Any) -> None:
    """Compare files with the SHA-256 that `state.json` holds since format 2.

    Raises:
        UserError: naming the first that is damaged.
    """
    for name, path in files.items():
        if isinstance(hashes, dict) and hashes.get(name) != file_hash(path):
            raise UserError(
                f"{path} is damaged (its SHA-256 is not that of state.json): write the name of an "
                "older checkpoint into LAST, or restore it from a copy"
            )


def _network_state(
    backbone: dict[str, Tensor], head: dict[str, Tensor], ignored: Sequence[str] = ()
) -> NetworkState:
    of_patches = sorted(name for name in head if name.startswith(OF_PATCHES))
    head = {name: tensor for name, tensor in head.items() if name not in of_patches}
    ignored = [*ignored, *of_patches]
    notes = [f"ignored, since no feature depends on it: {_listed(ignored)}"] if ignored else []
    if "last_layer.weight" in head:
        notes += ["the last layer was not weight-normed: it was split into norms and directions"]
    return NetworkState(backbone, head_of(head) if head else None, tuple(notes))


def _listed(names: Sequence[str]) -> str:
    """Names of tensors, those of several modules by their modules."""
    if len(names) <= 6:
        return ", ".join(shown(name) for name in names)
    modules = Counter(shown(".".join(name.split(".")[:2])) for name in names)
    return ", ".join(f"{name} ({count} tensors)" for name, count in modules.items())


def _head_options(network: NetworkState, stated: Mapping[str, Any]) -> dict[str, Any] | None:
    known = {name: value for name, value in stated.items() if value is not None}
    return None if network.head is None else {**network.head.options, **known}


# ------------------------------------------------------------------------------------ foreign
def _foreign(container: Container, heads: int | None, network: str) -> Checkpoint:
    path, content = container.path, container.content
    split, warnings = _networks(container, network)
    main = "teacher" if "teacher" in split else "student"
    arguments = attributes(content.get("args"))
    if not container.config and isinstance(content.get("arch"), str):
        container = replace(container, config=timm_config(content["arch"], arguments))
    layout = find_layout(split[main].backbone, container)
    networks = {}
    try:
        found = {name: to_dino(part.backbone, layout) for name, part in split.items()}
        hints = hints_of(container, layout, found[main][0])
        hints |= {"heads": heads} if heads else {}
        spec, assumed = spec_of(layout.family, found[main][0], hints)
        for name, (tensors, ignored) in found.items():
            backbone = with_periods(tensors, spec, hints.get("rope_base", BASE))
            left_out = sorted([*ignored, *split[name].others])
            networks[name] = _network_state(backbone, split[name].head, left_out)
        preprocessing, added = preprocessing_of(container, layout, spec)
    except (ValueError, RuntimeError) as error:  # also of shapes that cannot be joined
        kind = f"{layout.dialect} {layout.family}"
        raise UserError(f"{path} looks like weights of {kind}, but {error}") from None
    warnings += [*assumed, *added]
    loss = content.get("dino_loss", content.get("ibot_loss"))
    center = loss.get("center") if isinstance(loss, dict) else None
    stated = {"fixed_norm": arguments.get("norm_last_layer")}
    return Checkpoint(
        path,
        layout.dialect,
        spec,
        preprocessing,
        networks.get("teacher"),
        networks.get("student"),
        center.detach().flatten() if isinstance(center, Tensor) else None,
        _head_options(networks[main], stated),
        container.exported.get("about", {}),
        (*warnings, *dict.fromkeys(note for state in networks.values() for note in state.notes)),
        tuple(warnings),
    )


def _networks(container: Container, network: str) -> tuple[dict[str, Part], list[str]]:
    """The networks of a file, student and teacher or one alone, and a note if there are more."""
    content, usual = container.content, network in ("teacher", "student")
    states = {n: content[n] for n in ("teacher", "student") if isinstance(content.get(n), dict)}
    if usual and states:
        return {name: _only(state, container.path) for name, state in states.items()}, []
    keys = [key for key in dict.fromkeys([*WRAPPERS, *content]) if _is_network(content.get(key))]
    if network in keys:
        return {"teacher": _only(content[network], container.path)}, []
    wrapped = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    chosen = next(iter([*keys, *wrapped]), None)
    tensors = state_dict(content if chosen is None else content[chosen], container.path)
    inside = parts(tensors)
    names = {prefix.rstrip("."): part for prefix, part in inside.items()}
    if network in names and not usual:
        return {"teacher": names[network]}, []
    if not usual:
        found = ", ".join([*keys, *filter(None, names)]) or "a single one without a name"
        raise UserError(f"{container.path} holds no network {network!r}; it holds {found}")
    notes = []
    if len(keys) > 1:
        notes = [f"{keys[0]} was read, not {' or '.join(keys[1:])} of the same file: {CHOOSE}"]
    if not inside:
        return {"teacher": Part(unwrapped(tensors))}, notes
    roles = by_role(list(inside))
    if others := [prefix.rstrip(".") for prefix in inside if prefix not in roles.values()]:
        read_one = ", ".join(prefix.rstrip(".") for prefix in roles.values())
        notes.append(f"{read_one} was read, not {' or '.join(others)} of the same file: {CHOOSE}")
    return {role: inside[prefix] for role, prefix in roles.items()}, notes


def _only(tensors: Any, path: Path) -> Part:
    """The network in a state dict that holds one."""
    found = state_dict(tensors, path)
    inside = parts(found)
    return inside[first_of(list(inside))] if inside else Part(unwrapped(found))


def _is_network(value: Any) -> bool:
    """Whether a value of a file is the state dict of a network that dino knows."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return bool(parts(value))
