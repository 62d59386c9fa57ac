"""Other libraries' names for the same tensors: one two-way table for each layout.

A table maps patterns of their keys to patterns of dino's. `{}` stands for one part of a dotted name
or a piece of it, `{*}` for any rest. Where several keys stand on one side, their rows one after
another are the rows of the keys on the other side: that is the one transformation, `rows`, by which
separate query, key and value matrices become one qkv matrix and back.

    official       facebookresearch/dino: flat, or `student` and `teacher` with `backbone.`, `head.`
    timm           as `official` for ViTs; anything else of timm under its own names
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

Keys = str | tuple[str, ...]

VIT: dict[Keys, Keys] = {
    name: name
    for name in (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.{}",
        "blocks.{}.norm1.{}",
        "blocks.{}.attn.qkv.{}",
        "blocks.{}.attn.proj.{}",
        "blocks.{}.norm2.{}",
        "blocks.{}.mlp.fc1.{}",
        "blocks.{}.mlp.fc2.{}",
        "norm.{}",
    )
}
"""ViTs of the published code and of timm: dino's names are the published ones."""

TRANSFORMERS: dict[Keys, Keys] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.{}": "patch_embed.proj.{}",
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
    "layernorm.{}": "norm.{}",
}

TRANSFORMERS5: dict[Keys, Keys] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.{}": "patch_embed.proj.{}",
    "layers.{}.layernorm_before.{}": "blocks.{}.norm1.{}",
    (
        "layers.{}.attention.q_proj.{}",
        "layers.{}.attention.k_proj.{}",
        "layers.{}.attention.v_proj.{}",
    ): "blocks.{}.attn.qkv.{}",
    "layers.{}.attention.o_proj.{}": "blocks.{}.attn.proj.{}",
    "layers.{}.layernorm_after.{}": "blocks.{}.norm2.{}",
    "layers.{}.mlp.fc1.{}": "blocks.{}.mlp.fc1.{}",
    "layers.{}.mlp.fc2.{}": "blocks.{}.mlp.fc2.{}",
    "layernorm.{}": "norm.{}",
}

RESNET: dict[Keys, Keys] = {
    name: f"network.{name}"
    for name in (
        "conv1.weight",
        "bn1.{}",
        "layer{}.{}.conv{}.weight",
        "layer{}.{}.bn{}.{}",
        "layer{}.{}.downsample.{}.{}",
    )
}
"""ResNet-50 in torchvision, timm and the published code."""

XCIT: dict[Keys, Keys] = {
    "cls_token": "network.cls_token",
    "pos_embeder.token_projection.{}": "network.pos_embed.token_projection.{}",
    "patch_embed.proj.{}.{}.{}": "network.patch_embed.proj.{}.{}.{}",
    "blocks.{}.norm{}.{}": "network.blocks.{}.norm{}.{}",
    "blocks.{}.gamma{}": "network.blocks.{}.gamma{}",
    "blocks.{}.attn.temperature": "network.blocks.{}.attn.temperature",
    "blocks.{}.attn.qkv.{}": "network.blocks.{}.attn.qkv.{}",
    "blocks.{}.attn.proj.{}": "network.blocks.{}.attn.proj.{}",
    "blocks.{}.local_mp.{}.{}": "network.blocks.{}.local_mp.{}.{}",
    "blocks.{}.mlp.fc{}.{}": "network.blocks.{}.mlp.fc{}.{}",
    "cls_attn_blocks.{}.norm{}.{}": "network.cls_attn_blocks.{}.norm{}.{}",
    "cls_attn_blocks.{}.gamma{}": "network.cls_attn_blocks.{}.gamma{}",
    "cls_attn_blocks.{}.attn.qkv.{}": (
        "network.cls_attn_blocks.{}.attn.q.{}",
        "network.cls_attn_blocks.{}.attn.k.{}",
        "network.cls_attn_blocks.{}.attn.v.{}",
    ),
    "cls_attn_blocks.{}.attn.proj.{}": "network.cls_attn_blocks.{}.attn.proj.{}",
    "cls_attn_blocks.{}.mlp.fc{}.{}": "network.cls_attn_blocks.{}.mlp.fc{}.{}",
    "norm.{}": "network.norm.{}",
}
"""XCiT of facebookresearch/xcit; dino's is timm's, whose class attention has no joint qkv."""

ANY: dict[Keys, Keys] = {"{*}": "network.{*}"}
"""Any network of timm under its own names."""


@dataclass(frozen=True)
class Layout:
    """How one kind of network is written in one dialect.

    Attributes:
        dialect: its name.
        family: vit, resnet50, xcit or timm: which of dino's networks the tensors belong to.
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
    Layout("torchvision", "resnet50", RESNET, ("fc.{}",), ("layer1.0.conv1.weight", "fc.weight")),
    Layout("official", "resnet50", RESNET, (), ("layer1.0.conv1.weight",)),
    Layout("timm", "resnet50", RESNET, ("fc.{}",)),
    Layout("official", "vit", VIT, ("head.{}",), ("pos_embed", "blocks.0.attn.qkv.weight")),
    Layout("timm", "vit", VIT, ("head.{}",)),
    Layout("timm", "timm", ANY),
)
"""Tried in this order: the first whose anchors are all there."""


def detect(tensors: Iterable[str]) -> Layout | None:
    """The layout of a flat state dict by its keys, or None.

    A timm ViT that does not say so is `official`: the names are the same.
    """
    names = set(tensors)
    for layout in LAYOUTS:
        if layout.anchors and names.issuperset(layout.anchors):
            return layout
    return None


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
    return "resnet50" if arch == "resnet50" else "vit"


def to_dino(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under dino's names, bit for bit.

    Args:
        tensors: a flat state dict of a backbone in `layout`.
        layout: as `detect` found it.

    Returns:
        The tensors, with the counters of batch norm, which files from before PyTorch 0.4.1 lack;
        and the names that were ignored on purpose. A name that is in no table stays as it is, so
        that a strict load reports it as unexpected.
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


def from_dino(
    tensors: Mapping[str, Tensor], dialect: str, spec: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensors of one of dino's backbones under the names of a dialect, bit for bit.

    Args:
        tensors: the backbone's state dict.
        dialect: official, timm, transformers, transformers5 or torchvision.
        spec: the backbone's architecture.

    Raises:
        UserError: if the dialect has no such network.
    """
    layout = layout_of(dialect, family_of(spec, dialect))
    table = {dinos: theirs for theirs, dinos in layout.table.items()}
    return _translate(tensors, table)


# ------------------------------------------------------------------------------------ translation
def _translate(tensors: Mapping[str, Tensor], table: dict[Keys, Keys]) -> dict[str, Tensor]:
    """Each tensor under its name on the other side of `table`; unknown names as they are."""
    rules = [
        (_tuple(source), [_pattern(key) for key in _tuple(source)], _tuple(target))
        for source, target in table.items()
    ]
    done: dict[str, Tensor] = {}
    waiting = dict(tensors)
    for name in tensors:
        if name not in waiting:
            continue
        for sources, patterns, targets in rules:
            found = next((m for p in patterns if (m := p.fullmatch(name))), None)
            if found is None:
                continue
            group = [_fill(key, found.groups()) for key in sources]
            if all(key in waiting for key in group):
                filled = [_fill(key, found.groups()) for key in targets]
                values = rows([waiting.pop(key) for key in group], len(filled))
                done.update(zip(filled, values, strict=True))
                break
        else:
            done[name] = waiting.pop(name)
    return done


def rows(tensors: list[Tensor], count: int) -> list[Tensor]:
    """The rows of `tensors`, one after another, in `count` tensors of equal size."""
    if len(tensors) == count:
        return tensors
    joined = torch.cat(tensors)
    return list(joined.chunk(count)) if count > 1 else [joined]


def _tuple(keys: Keys) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else keys


def _pattern(key: str) -> re.Pattern[str]:
    escaped = re.escape(key).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)")
    return re.compile(escaped)


def _fill(key: str, parts: tuple[str, ...]) -> str:
    return key.replace("{*}", "{}").format(*parts)
