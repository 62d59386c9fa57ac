"""Which network tensors belong to, read from the tensors themselves.

Shapes tell width, depth, patch size, grid, channels and the MLP; only the number of heads leaves no
trace in a ViT. It comes from the library's configuration where there is one, else from the widths
of DeiT, DINO and timm; at another width the user has to say it, since a wrong number loads as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino.files import UserError
from dino.models.vit import SIZES

USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Attention heads of ViTs by their width, from tiny to large."""


def spec_of(family: str, tensors: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `dino.create` for tensors under our names.

    Args:
        family: vit, resnet50, xcit or timm, as `dialects.detect` found.
        tensors: a backbone's state dict.
        hints: what tensors cannot tell: `heads`, `norm_eps`, `position` of a ViT; `name`,
            `image_size` and `channels` of a network of timm.

    Raises:
        UserError: if they belong to no network that can be built.
    """
    if family == "resnet50":
        return {"arch": "resnet50", **_channels(tensors, "network.conv1.weight")}
    if family == "timm":
        usual = {"image_size": 224, "channels": 3}
        known = {key: hints[key] for key in usual if hints.get(key, usual[key]) != usual[key]}
        return {"arch": f"timm:{hints['name']}", **known}
    return _xcit(tensors) if family == "xcit" else _vit(tensors, hints)


def _vit(tensors: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    positions = _shape(tensors, "pos_embed", 3)
    patch = _shape(tensors, "patch_embed.proj.weight", 4)
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    count, width = positions[1] - 1, positions[2]
    side, depth = math.isqrt(count), _count(tensors, r"blocks\.(\d+)\.")
    if side * side != count:
        raise UserError(f"its {count} positions are no square grid of patches: resample them first")
    if patch[2] != patch[3]:
        raise UserError(f"its patches of {patch[2]} x {patch[3]} px are not square")
    heads = hints.get("heads") or _heads(width)
    sizes = {"embed_dim": width, "depth": depth, "heads": heads}
    arch = next((name for name, known in SIZES.items() if known == sizes), None)
    spec = {
        "arch": arch or "vit_small",
        **({} if arch else sizes),
        "patch_size": patch[2],
        "image_size": side * patch[2],
        **_channels(tensors, "patch_embed.proj.weight"),
        "position": hints.get("position", "reference"),
    }
    if hidden != 4 * width:  # halfway to the next whole width, so that rounding cannot matter
        spec["mlp_ratio"] = (hidden + 0.5) / width
    if hints.get("norm_eps", 1e-6) != 1e-6:
        spec["norm_eps"] = hints["norm_eps"]
    return spec


def _heads(width: int) -> int:
    if width not in USUAL_HEADS:
        raise UserError(
            f"the number of attention heads of its width {width} cannot be told: give heads= to "
            "dino.load, or --model.heads beside --init-from"
        )
    return USUAL_HEADS[width]


_XCITS = {(128, 12): "nano_12", (192, 12): "tiny_12", (192, 24): "tiny_24", (384, 12): "small_12"}
_XCITS |= {(384, 24): "small_24", (512, 24): "medium_24", (768, 24): "large_24"}


def _xcit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width = _shape(tensors, "network.cls_token", 3)[2]
    depth = _count(tensors, r"network\.blocks\.(\d+)\.")
    convolutions = {
        name for name in tensors if re.search(r"patch_embed\.proj\.\d+\.0\.weight", name)
    }
    patch = 2 ** len(convolutions)  # each halves the resolution
    if (width, depth) not in _XCITS or patch not in (8, 16):
        raise UserError(f"timm has no XCiT of width {width}, depth {depth} and patch size {patch}")
    channels = _channels(tensors, "network.patch_embed.proj.0.0.weight")
    return {"arch": f"timm:xcit_{_XCITS[width, depth]}_p{patch}_224", **channels}


def _channels(tensors: Mapping[str, Tensor], first: str) -> dict[str, int]:
    channels = _shape(tensors, first, 4)[1]
    return {} if channels == 3 else {"channels": channels}


def _shape(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"it lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"its {name} has the shape {shape}")
    return shape


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(
        (int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1
    )


# ------------------------------------------------------------------------------------ channels
def inflate(weight: Tensor, channels: int) -> Tensor:
    """First-layer weights [D, c, p, p] of c channels for another number of channels.

    The sum over channels is kept, so that an image whose channels are all equal gives the same
    output: the weights are repeated channel by channel, cyclically, and scaled by c / `channels`;
    for one channel they are summed. Uneven repetition is made up for, by scaling to the old sum.
    """
    own = weight.shape[1]
    total = weight.sum(dim=1, keepdim=True)
    if channels == 1:
        return total
    repeated = weight[:, [index % own for index in range(channels)]] * (own / channels)
    missing = total - repeated.sum(dim=1, keepdim=True)
    return repeated + missing / channels


def spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or deviations for another number of channels, as `inflate` treats weights."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[index % len(values)] for index in range(channels))


# ------------------------------------------------------------------------------------ the head
@dataclass(frozen=True)
class HeadParts:
    """A projection head.

    Attributes:
        tensors: under the names of `dino.models.head.Head`.
        options: the arguments of `Head` that the tensors show: prototypes, hidden, bottleneck,
            layers, batch_norm.
        notes: what had to be changed on the way, in words.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    notes: tuple[str, ...] = ()


HEAD_KEYS = {
    "mlp.weight": "mlp.0.weight",  # the published code has no Sequential around a single layer
    "mlp.bias": "mlp.0.bias",
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",  # newer PyTorch
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}
"""Other names of a head's tensors, and ours, which are the published ones."""


def head_of(tensors: Mapping[str, Tensor]) -> HeadParts:
    """A head of the published code, or ours, under our names.

    The released ResNet-50's last layer is not weight-normed: its rows are then split into norm and
    direction, which is the same function.

    Raises:
        UserError: if it is no such head.
    """
    ours = {HEAD_KEYS.get(name, name): tensor for name, tensor in tensors.items()}
    notes: tuple[str, ...] = ()
    if "last_layer.weight" in ours:
        plain = ours.pop("last_layer.weight")
        ours["last_layer.weight_v"] = plain
        ours["last_layer.weight_g"] = plain.norm(dim=1, keepdim=True)
        notes = ("the last layer was not weight-normed: its norms were split off",)
    prototypes, inputs = _shape(ours, "last_layer.weight_v", 2)
    linear = {
        n: t.shape for n, t in ours.items() if re.fullmatch(r"mlp\.\d+\.weight", n) and t.ndim == 2
    }
    shapes = [linear[name] for name in sorted(linear, key=lambda name: int(name.split(".")[1]))]
    bottleneck = inputs if "last_layer.weight_g" in ours else None
    if bottleneck is not None and not shapes:
        raise UserError("its head has no layer before the prototypes")
    options = {
        "prototypes": prototypes,
        **({"hidden": shapes[0][0]} if len(shapes) > (bottleneck is not None) else {}),
        "bottleneck": bottleneck,
        "layers": len(shapes) + (bottleneck is None),
        "batch_norm": any(name.endswith("running_mean") for name in ours),
    }
    return HeadParts(dict(ours), options, notes)
