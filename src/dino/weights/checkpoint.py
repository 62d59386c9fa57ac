"""What a checkpoint holds, whoever wrote it: student, teacher, heads and center under our names.

Readable are our run folders, their checkpoints and files, and what `dialects` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.weights.files import (
    Container,
    file_hash,
    open_container,
    own_metadata,
    read_header,
    read_safetensors,
)
from dino.weights.foreign_config import find_layout, hints_of, preprocessing_of
from dino.weights.infer_spec import HeadParts, head_of, spec_of
from dino.weights.key_maps import to_ours

WhichNetwork = Literal["teacher", "student"]

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which trainers keep a network's tensors."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and `torch.compile` put before every key."""


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint.

    Attributes:
        backbone: its state dict under our names.
        head: its projection head, if the checkpoint has it.
        left_out: keys of the file that no feature depends on, such as a classifier's.
    """

    backbone: dict[str, Tensor]
    head: HeadParts | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """A checkpoint, ready for `dino.create(**spec)`.

    Attributes:
        path: the file it was read from (of several, the teacher's).
        dialect: dino, or one of `dialects`.
        spec: the arguments of `dino.create`.
        preprocessing: the transform that belongs to the weights.
        teacher: the network that features are taken from. A file of a single network is this one:
            that is what the published "backbone only" files hold.
        student: the network that is trained.
        center: [K], subtracted from the teacher's logits; the published files of ResNet-50 and of
            single networks have none.
        head_options: arguments of `dino.models.head.Head` for the heads: those that tensors show,
            and `fixed_norm` and `activation` where the checkpoint says them. None without heads.
        about: what our own files say of themselves.
        notes: sentences for the user on what was changed or left out.
    """

    path: Path
    dialect: str
    spec: dict[str, Any]
    preprocessing: Preprocessing
    teacher: Part | None
    student: Part | None = None
    center: Tensor | None = None
    head_options: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def network(self, which: WhichNetwork) -> Part:
        """Student or teacher.

        Raises:
            UserError: if the checkpoint does not have it.
        """
        part = self.teacher if which == "teacher" else self.student
        if part is None:
            other = "student" if which == "teacher" else "teacher"
            raise UserError(f"{self.path} holds no {which}: ask for the {other}")
        return part

    def origin(self, which: WhichNetwork) -> dict[str, str]:
        """Dialect, file and its SHA-256, and which network, for the provenance of results."""
        path = self.path.with_name("student.safetensors") if self._in_files(which) else self.path
        return {
            "dialect": self.dialect,
            "network": which,
            "file": path.name,
            "file_sha256": file_hash(path),
        }

    def _in_files(self, which: WhichNetwork) -> bool:
        return which == "student" and (self.path.parent / "state.json").exists()


def read_parts(path: Path, heads: int | None = None) -> Parts:
    """Everything that a checkpoint holds.

    Args:
        path: a run folder, one of its checkpoints, the folder of a model of timm or transformers,
            or a file of weights.
        heads: attention heads of a ViT whose file cannot tell (see `architecture`).

    Raises:
        UserError: if it is none of these, in one sentence.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "state.json").exists():
        return _own_step(folder, folder.parent.parent / "teacher.safetensors")
    if path.is_dir() and (path / "teacher.safetensors").exists():
        if (step := last_step(path / "checkpoints")) is not None:
            return _own_step(step, path / "teacher.safetensors")
        path = path / "teacher.safetensors"
    container = open_container(path)
    known = own_metadata(container.metadata, container.path)
    if known is not None:
        return Parts(
            container.path,
            "dino",
            known["spec"],
            Preprocessing.from_dict(known["preprocessing"]),
            Part(container.content),
            about=known["about"],
        )
    return _foreign(container, heads)


# ------------------------------------------------------------------------------------ our own
def last_step(checkpoints: Path) -> Path | None:
    """The checkpoint that the file LAST of a run's folder `checkpoints` names; None without LAST.

    Raises:
        UserError: if LAST does not hold the name of a complete checkpoint beside it.
    """
    pointer = checkpoints / "LAST"
    if not pointer.exists():
        return None
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    complete = sorted(path.parent.name for path in checkpoints.glob("step_*/state.json"))
    if name not in complete:
        raise UserError(
            f"{pointer} holds {name!r}, which is no checkpoint beside it: write "
            f"{complete[-1] if complete else 'the name of a step_... folder'} into it"
        )
    return checkpoints / name


def _own_step(step: Path, teacher: Path) -> Parts:
    """A checkpoint of a run; the architecture stands in the run's `teacher.safetensors`."""
    if not teacher.exists():
        raise UserError(f"{teacher} is missing, which names the architecture of {step.name}")
    known = own_metadata(read_header(teacher), teacher)
    files = {name: step / f"{name}.safetensors" for name in ("teacher", "student", "loss")}
    absent = [path.name for path in files.values() if not path.exists()]
    if known is None or absent:
        raise UserError(f"{step} is no whole checkpoint of a run: {absent or teacher} is amiss")
    tensors = {name: read_safetensors(path)[0] for name, path in files.items()}
    config = teacher.parent / "config.json"
    settings = read_json(config).get("defining", {}) if config.exists() else {}
    said = {name: settings.get(f"head.{name}") for name in ("fixed_norm", "activation")}
    parts = {name: _split(tensors[name], step) for name in ("teacher", "student")}
    return Parts(
        files["teacher"],
        "dino",
        known["spec"],
        Preprocessing.from_dict(known["preprocessing"]),
        _part(*parts["teacher"]),
        _part(*parts["student"]),
        tensors["loss"].get("center"),
        _head_options(parts["student"][1], said),
        known["about"],
    )


def _part(backbone: dict[str, Tensor], head: dict[str, Tensor]) -> Part:
    return Part(backbone, head_of(head) if head else None)


def _head_options(head: dict[str, Tensor], said: Mapping[str, Any]) -> dict[str, Any] | None:
    if not head:
        return None
    known = {name: value for name, value in said.items() if value is not None}
    return {**head_of(head).options, **known}


# ------------------------------------------------------------------------------------ foreign
def _foreign(container: Container, heads: int | None) -> Parts:
    path, content = container.path, container.content
    split = {name: _split(tensors, path) for name, tensors in _networks(content).items()}
    main: WhichNetwork = "teacher" if "teacher" in split else "student"
    layout = find_layout(split[main][0], container)
    try:
        translated = {name: to_ours(part[0], layout) for name, part in split.items()}
        hints = {**hints_of(container, layout), **({"heads": heads} if heads else {})}
        spec = spec_of(layout.family, translated[main][0], hints)
        preprocessing = preprocessing_of(container, layout, spec)
        networks = {
            name: Part(
                _with_counters(tensors),
                head_of(split[name][1]) if split[name][1] else None,
                tuple(left_out),
            )
            for name, (tensors, left_out) in translated.items()
        }
    except UserError as error:
        kind = f"{layout.dialect} {layout.family}"
        raise UserError(f"{path} looks like weights of {kind}, but {error}") from None
    said = {"fixed_norm": getattr(content.get("args"), "norm_last_layer", None)}
    return Parts(
        path,
        layout.dialect,
        spec,
        preprocessing,
        networks.get("teacher"),
        networks.get("student"),
        _center(content),
        _head_options(split[main][1], said),
        container.exported().get("about", {}),
        _notes(networks),
    )


def _networks(content: dict[str, Any]) -> dict[WhichNetwork, Any]:
    """The state dicts of a file: student and teacher, or the only one, which is the teacher."""
    names: tuple[WhichNetwork, ...] = ("teacher", "student")
    found = {name: content[name] for name in names if isinstance(content.get(name), dict)}
    if found:
        return found
    wrapped = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
    return {"teacher": wrapped[0] if wrapped else content}


def _split(tensors: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Backbone and head of a network's state dict, prefixes removed where every key has them."""
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no tensors")
    odd = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        known = ", ".join(map(str, odd[:3]))
        raise UserError(f"{path} holds other things than tensors ({known}): is it a checkpoint?")
    plain: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in plain)), None):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    if not any(name.startswith("backbone.") for name in plain):
        if any(name.startswith("vit.") for name in plain):  # transformers' ViTFor...
            plain = {name.removeprefix("vit."): tensor for name, tensor in plain.items()}
        return plain, {}
    head = {n.removeprefix("head."): t for n, t in plain.items() if n.startswith("head.")}
    backbone = {
        n.removeprefix("backbone."): t for n, t in plain.items() if not n.startswith("head.")
    }
    return backbone, head


def _with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the counters of batch norm, which files from before PyTorch 0.4.1 lack."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.int64)
        for name in tensors
        if name.endswith("running_mean")
    }
    return {**counters, **tensors}


def _center(content: Mapping[str, Any]) -> Tensor | None:
    loss = content.get("dino_loss")
    center = loss.get("center") if isinstance(loss, dict) else None
    return center.detach().flatten() if isinstance(center, Tensor) else None


def _notes(networks: Mapping[WhichNetwork, Part]) -> tuple[str, ...]:
    notes: dict[str, None] = {}
    for part in networks.values():
        if part.left_out:
            notes[f"left out, since no feature depends on it: {', '.join(part.left_out)}"] = None
        if part.head:
            notes.update(dict.fromkeys(part.head.notes))
    return tuple(notes)
