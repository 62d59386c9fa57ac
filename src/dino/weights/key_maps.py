"""Other libraries' names for the same tensors: one two-way table for each layout.

A table maps patterns of their keys to patterns of dino's. `{}` stands for one component of a dotted
name, `{*}` for any rest; the first pattern that fits counts, and a name that fits none stays as it
is. Where several keys stand on one side, their rows one after another are the rows of the keys on
the other side: so separate query, key and value matrices become one qkv matrix and back.

    official       facebookresearch/dino: flat, or `student` and `teacher` with `backbone.`, `head.`
    timm           as `official` for ViTs; anything else of timm under its module names
    transformers   ViTModel as it lies on the disk: separate query, key and value
    transformers5  ViTModel's module names since transformers 5 (it still writes the former)
    torchvision    ResNet-50 with its classifier; without it that is `official`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino.files import UserError
from dino.models.convnet import RESNETS

Keys = str | tuple[str, ...]
Tensors = Mapping[str, Tensor]
"""A flat state dict."""

PUBLISHED: dict[Keys, Keys] = {}
"""ViTs of the published code and of timm: dino's names are the published ones."""

_EMBEDDINGS: dict[Keys, Keys] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.{}": "patch_embed.proj.{}",
    "layernorm.{}": "norm.{}",
}
TRANSFORMERS: dict[Keys, Keys] = {
    **_EMBEDDINGS,
    "encoder.layer.{}.layernorm_before.{}": "blocks.{}.norm1.{}",
    (
        "encoder.layer.{}.attention.attention.query.{}",
        "encoder.layer.{}.attention.attention.key.{}",
        "encoder.layer.{}.attention.attention.value.{}",
    ): "blocks.{}.attn.qkv.{}",
    "encoder.layer.{}.attention.output.dense.{}": "blocks.{}.attn.proj.{}",
    "encoder.layer.{}.layernorm_after.{}": "blocks.{}.norm2.{}",
    "encoder.layer.{}.intermediate.dense.{}": "blocks.{}.mlp.fc1.{}",
    "encoder.layer.{}.output.dense.{}": "blocks.{}.mlp.fc2.{}",
}
TRANSFORMERS5: dict[Keys, Keys] = {
    **_EMBEDDINGS,
    "layers.{}.layernorm_before.{}": "blocks.{}.norm1.{}",
    (
        "layers.{}.attention.q_proj.{}",
        "layers.{}.attention.k_proj.{}",
        "layers.{}.attention.v_proj.{}",
    ): "blocks.{}.attn.qkv.{}",
    "layers.{}.attention.o_proj.{}": "blocks.{}.attn.proj.{}",
    "layers.{}.layernorm_after.{}": "blocks.{}.norm2.{}",
    "layers.{}.mlp.{}.{}": "blocks.{}.mlp.{}.{}",
}

NETWORK: dict[Keys, Keys] = {"{*}": "network.{*}"}
"""ResNet-50 of torchvision, timm and the published code, and any network of timm."""

XCIT: dict[Keys, Keys] = {
    "pos_embeder.{*}": "network.pos_embed.{*}",
    "cls_attn_blocks.{}.attn.qkv.{}": (
        "network.cls_attn_blocks.{}.attn.q.{}",
        "network.cls_attn_blocks.{}.attn.k.{}",
        "network.cls_attn_blocks.{}.attn.v.{}",
    ),
    **NETWORK,
}
"""XCiT of facebookresearch/xcit; dino's is timm's, whose class attention has no joint qkv."""


@dataclass(frozen=True)
class Layout:
    """How one kind of network is written in one dialect.

    Attributes:
        dialect: its name.
        family: vit, resnet, xcit or timm: which of dino's networks the tensors belong to.
        table: their key patterns and dino's.
        ignored: patterns of their keys that no feature depends on: poolers and classifiers.
        anchors: keys that only this layout has; by them it is recognised.
    """

    dialect: str
    family: str
    table: dict[Keys, Keys]
    ignored: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()


_POOLER = ("pooler.{*}", "classifier.{*}", "embeddings.mask_token")
LAYOUTS = (
    Layout(
        "transformers", "vit", TRANSFORMERS, _POOLER, ("encoder.layer.0.layernorm_before.bias",)
    ),
    Layout("transformers5", "vit", TRANSFORMERS5, _POOLER, ("layers.0.layernorm_before.bias",)),
    Layout("official", "xcit", XCIT, ("head.{}",), ("pos_embeder.token_projection.bias",)),
    Layout("torchvision", "resnet", NETWORK, ("fc.{}",), ("layer1.0.conv1.weight", "fc.weight")),
    Layout("official", "resnet", NETWORK, (), ("layer1.0.conv1.weight",)),
    Layout("timm", "resnet", NETWORK, ("fc.{}",)),
    Layout("official", "vit", PUBLISHED, ("head.{}",), ("pos_embed", "blocks.0.attn.qkv.weight")),
    Layout("timm", "vit", PUBLISHED, ("head.{}",)),
    Layout("timm", "timm", NETWORK),
)
"""Tried in this order: the first whose anchors are all there."""


def detect(tensors: Iterable[str]) -> Layout | None:
    """The layout of a flat state dict by its keys, or None.

    A timm ViT that does not say so is `official`: the names are the same.
    """
    names = set(tensors)
    found = (layout for layout in LAYOUTS if layout.anchors and names.issuperset(layout.anchors))
    return next(found, None)


def layout_of(dialect: str, family: str) -> Layout:
    """The layout of a family of networks in a dialect.

    Raises:
        UserError: if the dialect has no such network.
    """
    for layout in LAYOUTS:
        if (layout.dialect, layout.family) == (dialect, family):
            return layout
    known = sorted({layout.dialect for layout in LAYOUTS if layout.family == family})
    raise UserError(f"{dialect} has no layout for {family}: choose {' or '.join(known)}")


def family_of(spec: Mapping[str, Any], dialect: str = "official") -> str:
    """The family of the architecture `spec` (the arguments of `dino.create`) in a dialect."""
    arch = str(spec["arch"])
    if arch.startswith("timm:"):
        return "xcit" if dialect == "official" and arch.startswith("timm:xcit") else "timm"
    return "resnet" if arch in RESNETS else "vit"


def to_dino(tensors: Tensors, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """A backbone's tensors in `layout` under dino's names, bit for bit, and the ignored names.

    The counters of batch norm are added to files from before PyTorch 0.4.1, which lack them.
    """
    patterns = [_pattern(pattern) for pattern in layout.ignored]
    ignored = {name for name in tensors if any(pattern.fullmatch(name) for pattern in patterns)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    named = _translate(rest, layout.table)
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.int64)
        for name in named
        if name.endswith("running_mean")
    }
    return {**counters, **named}, sorted(ignored)


def from_dino(tensors: Tensors, dialect: str, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a backbone of architecture `spec` in a dialect's names, bit for bit.

    Raises:
        UserError: if the dialect has no such network.
    """
    layout = layout_of(dialect, family_of(spec, dialect))
    table = {dinos: theirs for theirs, dinos in layout.table.items()}
    return _translate(tensors, table)


# ------------------------------------------------------------------------------------ translation
def _translate(tensors: Tensors, table: dict[Keys, Keys]) -> dict[str, Tensor]:
    """Each tensor under its name on the other side of `table`; unknown names as they are."""
    rules = [
        (_tuple(source), [_pattern(key) for key in _tuple(source)], _tuple(target))
        for source, target in table.items()
    ]
    translated: dict[str, Tensor] = {}
    remaining = dict(tensors)
    for name in tensors:
        for sources, patterns, targets in rules:
            found = next((m for p in patterns if (m := p.fullmatch(name))), None)
            group = [_fill(key, found.groups()) for key in sources] if found else []
            if found and remaining.keys() >= set(group):
                filled = [_fill(key, found.groups()) for key in targets]
                values = [remaining.pop(key) for key in group]
                if len(filled) != len(values):
                    values = list(torch.cat(values).chunk(len(filled)))
                translated.update(zip(filled, values, strict=True))
                break
    return {**translated, **remaining}


def _tuple(keys: Keys) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else keys


def _pattern(key: str) -> re.Pattern[str]:
    escaped = re.escape(key).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)")
    return re.compile(escaped)


def _fill(key: str, components: tuple[str, ...]) -> str:
    return key.replace("{*}", "{}").format(*components)
