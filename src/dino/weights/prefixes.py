"""Where in a flat state dict networks lie: prefixes that trainers and wrappers put before names.

A network is found by the keys that its layout alone has (`key_maps.Layout.anchors`), whatever is
before them: `module.`, `student_backbone.vit.`, `teacher.backbone.`, `state.encoder_q.`. What
wrappers put between the names of modules is removed first. Everything below a network's prefix
belongs to it and has to fit it; what lies elsewhere is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dino.weights.conventions import without_chunks
from dino.weights.key_maps import LAYOUTS

WRAPPED = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Of `torch.compile`, activation checkpointing and FSDP, at any place in a name."""
HEADS = ("head.", "dino_head.")
"""Beside `backbone.`: the projection head of DINO, and of DINOv2 and DINOv3."""
MOST = 64
"""Networks in a file; one with more is made to take long."""
TEACHERS = ("teacher", "ema")
STUDENTS = ("student",)
FIRST = ("backbone", "encoder_q", "base_encoder", "online", "query")
"""Words in the names of the networks that libraries evaluate, in the order of preference."""
LAST = ("momentum", "target", "encoder_k", "key", "decoder", "predictor")
"""Words in the names of networks that are a target of the training, or no encoder."""


@dataclass(frozen=True)
class Part:
    """One network of a state dict.

    Attributes:
        backbone: its tensors, without the prefix.
        head: those of its projection head, likewise.
        others: names of tensors that belong to no network.
    """

    backbone: dict[str, Any]
    head: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def parts(tensors: Mapping[str, Any]) -> dict[str, Part]:
    """The networks of a flat state dict by their prefixes, which end with a dot or are empty."""
    named = {without_chunks(WRAPPED.sub("", name)): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):  # two names became one
        named = dict(tensors)
    prefixes = _prefixes(named)
    heads = {prefix: _head_prefix(prefix, named) for prefix in prefixes}
    known = tuple(filter(None, [*prefixes, *heads.values()]))
    others = tuple(name for name in named if not name.startswith(known)) if known else ()
    return {
        prefix: Part(
            _below(prefix, named),
            {} if heads[prefix] is None else _below(str(heads[prefix]), named),
            () if prefix == "" else others,
        )
        for prefix in prefixes
    }


def _prefixes(names: Iterable[str]) -> list[str]:
    known = set(names)
    found = {
        name.removesuffix(layout.anchors[0])
        for layout in LAYOUTS
        if layout.anchors
        for name in known
        if name.endswith(layout.anchors[0])
        and known.issuperset(name.removesuffix(layout.anchors[0]) + key for key in layout.anchors)
    }
    starts = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if len(starts) > MOST:
        return []
    order = {name: place for place, name in enumerate(names)}
    inner = [p for p in starts if any(p != other and p.startswith(other) for other in starts)]
    outer = [p for p in starts if p not in inner]
    return sorted(outer, key=lambda p: min(order[n] for n in known if n.startswith(p)))


def _head_prefix(prefix: str, names: Iterable[str]) -> str | None:
    if not (f".{prefix}").endswith(".backbone."):
        return None
    known = list(names)
    for head in (prefix.removesuffix("backbone.") + head for head in HEADS):
        if any(name.startswith(f"{head}last_layer.") for name in known):
            return head
    return None


def _below(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an unknown network without the wrappers' `module.` before every name."""
    named = {WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    while named and all(name.startswith("module.") for name in named):
        named = _below("module.", named)
    return named if len(named) == len(tensors) else dict(tensors)


# ------------------------------------------------------------------------------------ which one
def by_role(prefixes: Sequence[str]) -> dict[str, str]:
    """The prefixes of teacher and student, or of one network alone, which counts as the teacher."""
    if len(prefixes) == 1:
        return {"teacher": prefixes[0]}
    teachers = [p for p in prefixes if _names(p, TEACHERS)]
    students = [p for p in prefixes if _names(p, STUDENTS)]
    if not teachers and students and len(students) < len(prefixes):
        teachers = [p for p in prefixes if p not in students]
    roles = {"teacher": teachers, "student": students}
    found = {role: first_of(some) for role, some in roles.items() if some}
    return found or {"teacher": first_of(prefixes)}


def first_of(prefixes: Sequence[str]) -> str:
    """The network that its library evaluates: by `FIRST` and `LAST`, then in the file's order."""

    def rank(prefix: str) -> tuple[int, int]:
        preferred = (place for place, word in enumerate(FIRST) if _names(prefix, (word,)))
        return (int(_names(prefix, LAST)), next(preferred, len(FIRST)))

    return min(prefixes, key=rank)


def _names(prefix: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(^|[._]){word}([._]|$)", prefix) for word in words)


def backbone_and_head(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`backbone.` and `head.` of a state dict of dino's own."""
    return _below("backbone.", tensors), _below("head.", tensors)
