"""Other libraries' names for the same tensors: one two-way table for each layout.

A table maps patterns of their keys to patterns of dino's. `{}` stands for one component of a dotted
name, `{*}` for any rest; the first pattern that fits counts, and a name that fits none stays as it
is. Where several keys stand on one side, their rows one after another are the rows of the keys on
the other side: so separate query, key and value matrices become one qkv matrix and back.

    official       facebookresearch's: flat, or `student` and `teacher` with `backbone.`, `head.`
    timm           as `official` for ViTs; anything else of timm under its module names
    transformers   as it lies on the disk: separate query, key and value
    transformers5  module names since transformers 5 (it still writes the former)
    torchvision    ResNet-50 with its classifier; without it that is `official`

ViTs have a table for each generation, since their parts have other names: `vit` for DINO, iBOT,
DeiT, MAE and MSN, `dinov2`, and `dinov3`, whose positions are rotary; the last two once more with
SwiGLU. What differs in more than names is in `conventions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino.files import UserError
from dino.models.convnet import CONVNEXTS, RESNETS
from dino.weights.conventions import (
    as_written_by,
    complete,
    with_bias_of_keys,
    with_shape_of_scales,
)

Keys = str | tuple[str, ...]
Tensors = Mapping[str, Tensor]
"""A flat state dict."""

PUBLISHED: dict[Keys, Keys] = {}
"""ViTs of the published code, DINOv2's too, and of timm: dino's names are the published ones."""

DINOV3: dict[Keys, Keys] = {"storage_tokens": "register_tokens"}
"""DINOv3's ViT in the published code."""
DINOV3_SWIGLU: dict[Keys, Keys] = {
    ("blocks.{}.mlp.w1.{}", "blocks.{}.mlp.w2.{}"): "blocks.{}.mlp.w12.{}",
    **DINOV3,
}
TIMM_DINOV2: dict[Keys, Keys] = {"reg_token": "register_tokens"}
TIMM_DINOV2_SWIGLU: dict[Keys, Keys] = {
    "blocks.{}.mlp.fc1.{}": "blocks.{}.mlp.w12.{}",
    "blocks.{}.mlp.fc2.{}": "blocks.{}.mlp.w3.{}",
    **TIMM_DINOV2,
}
TIMM_DINOV3: dict[Keys, Keys] = {
    "blocks.{}.gamma_1": "blocks.{}.ls1.gamma",
    "blocks.{}.gamma_2": "blocks.{}.ls2.gamma",
    **TIMM_DINOV2,
}
TIMM_DINOV3_SWIGLU: dict[Keys, Keys] = {
    ("blocks.{}.mlp.fc1_g.{}", "blocks.{}.mlp.fc1_x.{}"): "blocks.{}.mlp.w12.{}",
    "blocks.{}.mlp.fc2.{}": "blocks.{}.mlp.w3.{}",
    **TIMM_DINOV3,
}

_EMBEDDINGS: dict[Keys, Keys] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
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


def _transformers_blocks(block: str, attention: str, mlp: dict[Keys, Keys]) -> dict[Keys, Keys]:
    """DINOv2 and DINOv3: the names below `block`, of which `attention` holds the projections."""
    separate = attention.startswith("attention.attention")
    q, k, v = ("query", "key", "value") if separate else ("q_proj", "k_proj", "v_proj")
    proj = "attention.output.dense" if separate else "attention.o_proj"
    names: dict[Keys, Keys] = {
        "norm{}.{}": "norm{}.{}",
        (f"{attention}{q}.{{}}", f"{attention}{k}.{{}}", f"{attention}{v}.{{}}"): "attn.qkv.{}",
        f"{proj}.{{}}": "attn.proj.{}",
        "layer_scale{}.lambda1": "ls{}.gamma",
        **mlp,
    }

    def below(prefix: str, keys: Keys) -> Keys:
        return prefix + keys if isinstance(keys, str) else tuple(prefix + key for key in keys)

    return {below(block, theirs): below("blocks.{}.", ours) for theirs, ours in names.items()}


_GELU: dict[Keys, Keys] = {"mlp.fc{}.{}": "mlp.fc{}.{}"}
_PACKED: dict[Keys, Keys] = {
    "mlp.weights_in.{}": "mlp.w12.{}",
    "mlp.weights_out.{}": "mlp.w3.{}",
}
_PROJECTIONS: dict[Keys, Keys] = {
    "mlp.up_proj.{}": "mlp.fc1.{}",
    "mlp.down_proj.{}": "mlp.fc2.{}",
}
_GATED: dict[Keys, Keys] = {
    ("mlp.gate_proj.{}", "mlp.up_proj.{}"): "mlp.w12.{}",
    "mlp.down_proj.{}": "mlp.w3.{}",
}
_V2: dict[Keys, Keys] = {**_EMBEDDINGS, "embeddings.register_tokens": "register_tokens"}
_V3: dict[Keys, Keys] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.{}": "patch_embed.proj.{}",
}
_ON_DISK, _MODULE = "encoder.layer.{}.", "attention."
HF_DINOV2 = {**_V2, **_transformers_blocks(_ON_DISK, "attention.attention.", _GELU)}
HF_DINOV2_SWIGLU = {**_V2, **_transformers_blocks(_ON_DISK, "attention.attention.", _PACKED)}
HF5_DINOV2 = {**_V2, **_transformers_blocks(_ON_DISK, _MODULE, _GELU)}
HF5_DINOV2_SWIGLU = {**_V2, **_transformers_blocks(_ON_DISK, _MODULE, _GATED)}
HF_DINOV3 = {**_V3, **_transformers_blocks("layer.{}.", _MODULE, _PROJECTIONS)}
HF_DINOV3_SWIGLU = {**_V3, **_transformers_blocks("layer.{}.", _MODULE, _GATED)}
HF5_DINOV3 = {**_V3, **_transformers_blocks("model.layer.{}.", _MODULE, _PROJECTIONS)}
HF5_DINOV3_SWIGLU = {**_V3, **_transformers_blocks("model.layer.{}.", _MODULE, _GATED)}

_BLOCK_OF_CONVNEXT: dict[str, str] = {
    "dwconv": "0",
    "norm": "2",
    "pwconv1": "3",
    "pwconv2": "5",
}
"""The layers of a block of ConvNeXt in facebookresearch's code, and in torchvision's."""
_STAGES = {stage: 2 * stage + 1 for stage in range(4)}


def _convnext(
    stem: str, downsample: str, block: str, layers: dict[str, str], gamma: str, norm: str
) -> dict[Keys, Keys]:
    """Names of ConvNeXt: patterns with the stage as `{stage}` and the layer as `{layer}`."""
    table: dict[Keys, Keys] = {}
    for index in range(2):
        table[stem.format(layer=index) + ".{}"] = f"network.features.0.{index}.{{}}"
    for stage, ours in _STAGES.items():
        for index in range(2 if stage else 0):
            theirs = downsample.format(stage=stage, layer=index)
            table[theirs + ".{}"] = f"network.features.{ours - 1}.{index}.{{}}"
        place = block.replace("STAGE", str(stage))
        for name, number in layers.items():
            table[f"{place}.{name}.{{}}"] = f"network.features.{ours}.{{}}.block.{number}.{{}}"
        table[f"{place}.{gamma}"] = f"network.features.{ours}.{{}}.layer_scale"
    table[norm + ".{}"] = "network.classifier.0.{}"
    return table


CONVNEXT = _convnext(
    "downsample_layers.0.{layer}",
    "downsample_layers.{stage}.{layer}",
    "stages.STAGE.{}",
    _BLOCK_OF_CONVNEXT,
    "gamma",
    "norm",
)
TIMM_CONVNEXT = _convnext(
    "stem.{layer}",
    "stages.{stage}.downsample.{layer}",
    "stages.STAGE.blocks.{}",
    {"conv_dw": "0", "norm": "2", "mlp.fc1": "3", "mlp.fc2": "5"},
    "gamma",
    "head.norm",
)
_HF_LAYERS = {
    "depthwise_conv": "0",
    "layer_norm": "2",
    "pointwise_conv1": "3",
    "pointwise_conv2": "5",
}
HF_CONVNEXT = _convnext(
    "stages.0.downsample_layers.{layer}",
    "stages.{stage}.downsample_layers.{layer}",
    "stages.STAGE.layers.{}",
    _HF_LAYERS,
    "gamma",
    "layer_norm",
)
HF5_CONVNEXT: dict[Keys, Keys] = {
    (theirs if theirs == "layer_norm.{}" else f"model.{theirs}"): ours
    for theirs, ours in HF_CONVNEXT.items()
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


_POOLER = (
    *("pooler.{*}", "classifier.{*}", "cls_classifier.{*}", "distillation_classifier.{*}"),
    *("decoder.{*}", "embeddings.mask_token"),
)
_HEADS = (
    *("head.{*}", "head_dist.{*}", "mask_token", "masked_embed", "decoder_{*}"),
    "local_cls_norm.{}",  # of DINOv3's pretraining: of the CLS tokens of small crops
)
_QKV, _HF_NORM = "blocks.0.attn.qkv.weight", "encoder.layer.0.norm1.bias"
_HF3, _HF53 = "layer.0.layer_scale1.lambda1", "model.layer.0.layer_scale1.lambda1"
LAYOUTS = (
    Layout(
        "transformers", "vit", TRANSFORMERS, _POOLER, ("encoder.layer.0.layernorm_before.bias",)
    ),
    Layout("transformers5", "vit", TRANSFORMERS5, _POOLER, ("layers.0.layernorm_before.bias",)),
    Layout(
        "transformers",
        "dinov2_swiglu",
        HF_DINOV2_SWIGLU,
        _POOLER,
        (_HF_NORM, "encoder.layer.0.mlp.weights_in.bias"),
    ),
    Layout(
        "transformers5",
        "dinov2_swiglu",
        HF5_DINOV2_SWIGLU,
        _POOLER,
        (_HF_NORM, "encoder.layer.0.mlp.gate_proj.bias"),
    ),
    Layout(
        "transformers5",
        "dinov2",
        HF5_DINOV2,
        _POOLER,
        (_HF_NORM, "encoder.layer.0.attention.q_proj.bias"),
    ),
    Layout("transformers", "dinov2", HF_DINOV2, _POOLER, (_HF_NORM,)),
    Layout(
        "transformers5",
        "dinov3_swiglu",
        HF5_DINOV3_SWIGLU,
        _POOLER,
        (_HF53, "model.layer.0.mlp.gate_proj.weight"),
    ),
    Layout("transformers5", "dinov3", HF5_DINOV3, _POOLER, (_HF53,)),
    Layout(
        "transformers",
        "dinov3_swiglu",
        HF_DINOV3_SWIGLU,
        _POOLER,
        (_HF3, "layer.0.mlp.gate_proj.weight"),
    ),
    Layout("transformers", "dinov3", HF_DINOV3, _POOLER, (_HF3,)),
    Layout(
        "transformers5",
        "convnext",
        HF5_CONVNEXT,
        (),
        ("model.stages.0.layers.0.depthwise_conv.bias", "layer_norm.weight"),
    ),
    Layout(
        "transformers",
        "convnext",
        HF_CONVNEXT,
        (),
        ("stages.0.layers.0.depthwise_conv.bias", "layer_norm.weight"),
    ),
    Layout("official", "xcit", XCIT, ("head.{}",), ("pos_embeder.token_projection.bias",)),
    Layout(
        "official", "convnext", CONVNEXT, ("head.{*}", "norms.{*}"), ("stages.0.0.dwconv.bias",)
    ),
    Layout(
        "timm",
        "convnext",
        TIMM_CONVNEXT,
        ("head.fc.{*}",),
        ("stages.0.blocks.0.conv_dw.bias", "stages.0.blocks.0.gamma"),
    ),
    Layout(
        "torchvision",
        "convnext",
        NETWORK,
        ("classifier.2.{}",),
        ("features.0.0.weight", "features.1.0.layer_scale"),
    ),
    Layout("torchvision", "resnet", NETWORK, ("fc.{}",), ("layer1.0.conv1.weight", "fc.weight")),
    Layout("official", "resnet", NETWORK, ("fc.{*}",), ("layer1.0.conv1.weight",)),
    Layout("timm", "resnet", NETWORK, ("fc.{}",)),
    Layout(
        "official",
        "dinov3_swiglu",
        DINOV3_SWIGLU,
        _HEADS,
        ("rope_embed.periods", "blocks.0.mlp.w1.weight", _QKV),
    ),
    Layout("official", "dinov3", DINOV3, _HEADS, ("rope_embed.periods", _QKV)),
    Layout(
        "timm",
        "dinov3_swiglu",
        TIMM_DINOV3_SWIGLU,
        _HEADS,
        ("reg_token", "blocks.0.gamma_1", "blocks.0.mlp.fc1_g.weight", _QKV),
    ),
    Layout("timm", "dinov3", TIMM_DINOV3, _HEADS, ("reg_token", "blocks.0.gamma_1", _QKV)),
    Layout("timm", "dinov2", TIMM_DINOV2, _HEADS, ("reg_token", "pos_embed", _QKV)),
    Layout("official", "vit", PUBLISHED, _HEADS, ("pos_embed", _QKV)),
    Layout("timm", "vit", PUBLISHED, _HEADS),
    Layout("timm", "dinov2_swiglu", TIMM_DINOV2_SWIGLU, _HEADS),
    Layout("official", "dinov2", PUBLISHED, _HEADS),
    Layout("official", "dinov2_swiglu", PUBLISHED, _HEADS),
    Layout("timm", "timm", NETWORK),
)
"""Tried in this order: the first whose anchors are all there. Those without anchors are for writing
and for networks that a configuration names."""

VITS = ("vit", "dinov2", "dinov2_swiglu", "dinov3", "dinov3_swiglu")
"""Families whose network is `dino.models.vit`."""
DINO_VITS = tuple(family for family in VITS if family != "vit")


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
    if arch in CONVNEXTS:
        return "convnext"
    if arch in RESNETS:
        return "resnet"
    swiglu = "_swiglu" if spec.get("mlp") == "swiglu" else ""
    if spec.get("position") == "rope":
        return f"dinov3{swiglu}"
    newer = swiglu or spec.get("registers") or spec.get("layer_scale") is not None
    return f"dinov2{swiglu}" if newer else "vit"


def to_dino(tensors: Tensors, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """A backbone's tensors in `layout` under dino's names, bit for bit, and the ignored names.

    What other libraries leave out (`conventions.complete`) is added, as are the counters of batch
    norm to files from before PyTorch 0.4.1.
    """
    patterns = [_pattern(pattern) for pattern in layout.ignored]
    ignored = {name for name in tensors if any(pattern.fullmatch(name) for pattern in patterns)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    if layout.family.startswith("dinov3"):
        rest = with_bias_of_keys(rest)
    named = _translate(rest, layout.table)
    if layout.family in VITS:
        named = complete(named)
    if layout.family == "convnext":
        named = with_shape_of_scales(named, (-1, 1, 1))
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.int64)
        for name in named
        if name.endswith("running_mean")
    }
    return {**counters, **named}, sorted(ignored)


def from_dino(tensors: Tensors, dialect: str, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a backbone of architecture `spec` in a dialect's names.

    Bit for bit, save what `conventions.as_written_by` states.

    Raises:
        UserError: if the dialect has no such network.
    """
    layout = layout_of(dialect, family_of(spec, dialect))
    table = {dinos: theirs for theirs, dinos in layout.table.items()}
    if layout.family in DINO_VITS:
        tensors = as_written_by(dialect, layout.family, tensors, spec)
    if layout.family == "convnext" and dialect != "torchvision":
        tensors = with_shape_of_scales(tensors, (-1,))
    written = _translate(tensors, table)
    if layout.family.startswith("dinov3") and not spec.get("key_bias", True):
        written = {name: t for name, t in written.items() if not name.endswith("k_proj.bias")}
    if dialect == "official" and layout.family == "convnext":
        written |= {
            f"norms.3.{name}": written[f"norm.{name}"].clone() for name in ("weight", "bias")
        }
    return written


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
