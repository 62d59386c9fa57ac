"""Which network tensors belong to, read from the tensors themselves.

Shapes show embed_dim, depth, patch size, grid, channels and the MLP; only the number of heads
leaves no trace in a ViT. It comes from the library's configuration where there is one, else it is
assumed from embed_dim, as in DeiT, DINO and timm; where that is doubtful the user has to state it,
since a wrong number loads as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino.files import UserError
from dino.models.convnet import CONVNEXTS
from dino.models.rope import BASE, periods
from dino.models.vit import SIZES
from dino.weights.conventions import has_key_bias
from dino.weights.key_maps import Tensors

USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
"""Attention heads of ViTs by embed_dim, from tiny to huge, and of DINOv2's giant."""
STATE_HEADS = "`dino weights convert --heads N` writes a file that states them (in Python: heads=N)"


Spec = dict[str, Any]
"""Arguments of `dino.create`."""


def spec_of(family: str, tensors: Tensors, hints: Mapping[str, Any]) -> tuple[Spec, list[str]]:
    """The arguments of `dino.create` for tensors under dino's names, and what was assumed.

    Args:
        family: as `key_maps.detect` found.
        tensors: a backbone's state dict.
        hints: what tensors do not show: `heads`, `norm_eps`, `position` of a ViT, the `image_size`
            of one with rotary positions; `name`, `image_size` and `channels` of a network of timm.

    Raises:
        UserError: if they belong to no network that can be built, or to one of several.
    """
    if family == "resnet":
        return _resnet(tensors, "name" in hints)
    if family == "timm":
        usual = {"image_size": 224, "channels": 3}
        known = {key: hints[key] for key in usual if hints.get(key, usual[key]) != usual[key]}
        return {"arch": f"timm:{hints['name']}", **known}, []
    if family == "convnext":
        return _convnext(tensors), []
    if family == "xcit":
        return _xcit(tensors), []
    return _vit(tensors, hints, family.startswith("dinov3"))


def _resnet(tensors: Tensors, named: bool) -> tuple[Spec, list[str]]:
    blocks = tuple(_count(tensors, rf"network\.layer{n}\.(\d+)\.") for n in range(1, 5))
    width = _shape(tensors, "network.layer1.0.conv1.weight", 4)[0]
    bottlenecks = "network.layer1.0.conv3.weight" in tensors
    deep = "network.conv1.0.weight" in tensors
    known: dict[tuple[Any, ...], str] = {
        ((1, 1, 1, 1), False, True): "resnet10t",
        ((2, 2, 2, 2), False, False): "resnet18",
        ((3, 4, 6, 3), True, False): "resnet50",
    }
    arch = known.get((blocks, bottlenecks, deep))
    if arch is None or width != 64:
        raise UserError(
            "its blocks are those of another ResNet: name it in a config.json beside the file "
            '(model.safetensors or pytorch_model.bin), such as {"architecture": "resnet34"}'
        )
    assumed = (
        f"read as {arch}: the file names no architecture, and variants such as timm's resnetaa50 "
        "have the same keys and other features"
    )
    first = "network.conv1.0.weight" if deep else "network.conv1.weight"
    spec = {"arch": arch, **_channels(tensors, first)}
    return spec, [] if named else [assumed]


def _vit(tensors: Tensors, hints: Mapping[str, Any], rotary: bool) -> tuple[Spec, list[str]]:
    patch = _shape(tensors, "patch_embed.proj.weight", 4)
    embed_dim, depth = patch[0], _count(tensors, r"blocks\.(\d+)\.")
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    hidden = _shape(tensors, f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight", 2)[1]
    for name, what in _OTHER_VITS.items():
        if name in tensors:
            raise UserError(f"it is a ViT {what} ({name}), which is none of dino's: {OTHERS}")
    if rotary:
        size = hints.get("image_size", 256)
    else:
        count = _shape(tensors, "pos_embed", 3)[1] - 1
        side = math.isqrt(count)
        size = side * patch[2]
        if side * side != count:
            raise UserError(
                f"its {count} positions are no square grid of patches: resample them first"
            )
    if any(name.startswith("patch_embed.") and ".proj." not in name for name in tensors):
        raise UserError("it has a stem of convolutions, but no description: load the run's folder")
    if patch[2] != patch[3]:
        raise UserError(f"its patches of {patch[2]} x {patch[3]} px are not square")
    heads, assumed = hints.get("heads"), []
    if "rope_embed.periods" in tensors:  # a quarter of a head's channels
        heads = embed_dim // (4 * _shape(tensors, "rope_embed.periods", 1)[0])
    if not heads:
        learned = None if "register_tokens" in tensors else tensors.get("pos_embed")
        heads = _usual_heads(embed_dim, learned)
        assumed = [f"{heads} attention heads are assumed for embed_dim {embed_dim}: {STATE_HEADS}"]
    sizes = {"embed_dim": embed_dim, "depth": depth, "heads": heads}
    arch = next((name for name, known in SIZES.items() if known == sizes), None)
    spec = {
        "arch": arch or "vit_small",
        **({} if arch else sizes),
        "patch_size": patch[2],
        "image_size": size,
        **_channels(tensors, "patch_embed.proj.weight"),
        "position": "rope" if rotary else hints.get("position", "reference"),
    }
    if "register_tokens" in tensors:
        spec["registers"] = _shape(tensors, "register_tokens", 3)[1]
        if not rotary and "position" not in hints:
            spec["position"] = "antialias"
    if "blocks.0.ls1.gamma" in tensors:
        spec["layer_scale"] = 1.0
    if swiglu:
        spec["mlp"] = "swiglu"
    if rotary and not has_key_bias(tensors):
        spec["key_bias"] = False
    if hidden != 4 * embed_dim:  # halfway to the next integer, so that rounding cannot matter
        spec["mlp_ratio"] = (hidden + 0.5) / embed_dim
    if hints.get("norm_eps", 1e-6) != 1e-6:
        spec["norm_eps"] = hints["norm_eps"]
    return spec, assumed


def with_periods(tensors: Tensors, spec: Spec, base: float = BASE) -> dict[str, Tensor]:
    """The tensors of a network `spec`, with the periods of rotary positions if they lack them."""
    if spec.get("position") != "rope" or "rope_embed.periods" in tensors:
        return dict(tensors)
    known = {**SIZES.get(spec["arch"], {}), **spec}
    found = periods(known["embed_dim"] // known["heads"], base)
    return {**tensors, "rope_embed.periods": found}


_OTHER_VITS = {
    "cls_norm.weight": "with a final norm of its own for CLS",
    "norm_pre.weight": "with a norm before its blocks, as CLIP's",
    "fc_norm.weight": "whose feature is the mean of its patches",
    "attn_pool.latent": "whose feature is pooled by attention, as SigLIP's",
    "blocks.0.attn.relative_position_bias_table": "with relative positions, as BEiT's",
    "rel_pos_bias.relative_position_bias_table": "with relative positions, as BEiT's",
    "blocks.0.attn.q_norm.weight": "whose queries and keys are normed",
}
"""Names of tensors of other ViTs that have the keys of a plain one too, and what these are."""
OTHERS = (
    "for timm's own module put a config.json with its name beside the file (model.safetensors or "
    'pytorch_model.bin), such as {"architecture": "vit_base_patch16_clip_224"}'
)


def _convnext(tensors: Tensors) -> Spec:
    depths = tuple(_count(tensors, rf"network\.features\.{n}\.(\d+)\.") for n in (1, 3, 5, 7))
    names = (f"network.features.{n}.0.layer_scale" for n in (1, 3, 5, 7))
    sizes = {"depths": depths, "dims": tuple(_shape(tensors, name, 3)[0] for name in names)}
    arch = next((name for name, known in CONVNEXTS.items() if known == sizes), None)
    channels = _channels(tensors, "network.features.0.0.weight")
    return {"arch": arch or "convnext_tiny", **({} if arch else sizes), **channels}


def _usual_heads(embed_dim: int, positions: Tensor | None) -> int:
    if embed_dim not in USUAL_HEADS:
        raise UserError(
            f"the number of its attention heads is unknown (embed_dim {embed_dim}): {STATE_HEADS}"
        )
    if embed_dim == 384 and positions is not None and not positions[:, 0].any():
        raise UserError(
            "its position embedding has zeros for the CLS token, as MoCo-v3's fixed one, whose "
            f"ViT-S has 12 attention heads and not 6: {STATE_HEADS}"
        )
    return USUAL_HEADS[embed_dim]


_XCITS = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
"""timm's names by embed_dim; `create` refuses those that timm lacks, such as nano_24."""


def _xcit(tensors: Tensors) -> Spec:
    embed_dim = _shape(tensors, "network.cls_token", 3)[2]
    depth = _count(tensors, r"network\.blocks\.(\d+)\.")
    convolutions = [n for n in tensors if re.search(r"patch_embed\.proj\.\d+\.0\.weight", n)]
    if embed_dim not in _XCITS:
        raise UserError(f"timm has no XCiT of embed_dim {embed_dim}")
    patch = 2 ** len(convolutions)  # each halves the resolution
    channels = _channels(tensors, "network.patch_embed.proj.0.0.weight")
    return {"arch": f"timm:xcit_{_XCITS[embed_dim]}_{depth}_p{patch}_224", **channels}


def _channels(tensors: Tensors, first: str) -> dict[str, int]:
    channels = _shape(tensors, first, 4)[1]
    return {} if channels == 3 else {"channels": channels}


def _shape(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"it lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"its {name} has the shape {shape}")
    return shape


def _count(tensors: Tensors, pattern: str) -> int:
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    return 1 + max(numbers, default=-1)


# ------------------------------------------------------------------------------------ the head
@dataclass(frozen=True)
class HeadState:
    """A projection head.

    Attributes:
        tensors: under the names of `dino.models.head.Head`.
        options: the arguments of `Head` that the tensors show: prototypes, hidden, bottleneck,
            layers, batch_norm.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]


HEAD_KEYS = {
    "mlp.weight": "mlp.0.weight",  # the published code has no Sequential around a single layer
    "mlp.bias": "mlp.0.bias",
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",  # newer PyTorch
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}
"""Other names of a head's tensors, and dino's, which are the published ones."""


def head_of(tensors: Tensors) -> HeadState:
    """A head of the published code, or of dino, under dino's names.

    The released ResNet-50's last layer is not weight-normed: its rows are then split into norm and
    direction, which is the same function.

    Raises:
        UserError: if it is no such head.
    """
    named = {HEAD_KEYS.get(name, name): tensor for name, tensor in tensors.items()}
    if "last_layer.weight" in named:
        named["last_layer.weight_v"] = plain = named.pop("last_layer.weight")
        named["last_layer.weight_g"] = plain.norm(dim=1, keepdim=True)
    prototypes, inputs = _shape(named, "last_layer.weight_v", 2)
    linear = [n for n, t in named.items() if re.fullmatch(r"mlp\.\d+\.weight", n) and t.ndim == 2]
    bottleneck = inputs if "last_layer.weight_g" in named else None
    if bottleneck is not None and not linear:
        raise UserError("its head has no layer before the prototypes")
    options = {
        "prototypes": prototypes,
        "bottleneck": bottleneck,
        "layers": len(linear) + (bottleneck is None),
        "batch_norm": any(name.endswith("running_mean") for name in named),
    }
    if len(linear) > (bottleneck is not None):
        options["hidden"] = _shape(named, "mlp.0.weight", 2)[0]
    return HeadState(named, options)
