"""Where libraries write the same ViT in more than other names: tensors that one leaves out.

Reading adds what dino's network has and the file leaves out, because it is zero or part of another
tensor; writing does the reverse. Everything is exact: the network computes the same function.

    bias of queries, keys, values   none at all, none for keys, or a mask of zeros on that of keys
    position of CLS                 timm adds it to the CLS token itself where there are registers
    distillation token              DeiT's: a register with a position, which is added to it
    mask token                      DINOv2's and DINOv3's own code has one; no feature depends on it
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dino.files import UserError

Tensors = Mapping[str, Tensor]


# ------------------------------------------------------------------------------------ reading
def without_chunks(name: str) -> str:
    """DINOv2 wraps blocks in chunks for FSDP: its `blocks.0.11.` is `blocks.11.`."""
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)


def with_bias_of_keys(tensors: Tensors) -> dict[str, Tensor]:
    """A file of transformers' DINOv3, of which no key has a bias, with zeros for it."""
    if any(name.endswith("k_proj.bias") for name in tensors):
        return dict(tensors)
    biases = {
        name.replace("q_proj", "k_proj"): torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if name.endswith("q_proj.bias")
    }
    return {**tensors, **biases}


def complete(tensors: Tensors) -> dict[str, Tensor]:
    """A ViT's tensors under dino's names, with what its library leaves out.

    Raises:
        UserError: if a mask of biases is none of the keys.
    """
    found = dict(tensors)
    if "register_tokens" in found and not found["register_tokens"].numel():
        del found["register_tokens"]
    without = not any(re.search(r"(\.qkv|query|q_proj)\.bias$|\.q_bias$", name) for name in found)
    for block in _blocks(found):
        _complete_bias(found, f"{block}.attn.", without)
    positions = found.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return found
    token = found.pop("dist_token", None)
    if token is not None and positions.shape[1] > 2:
        found["register_tokens"] = token + positions[:, 1:2]
        found["pos_embed"] = positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    if "register_tokens" in found and _is_square(positions.shape[1]):
        found["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return found


def _blocks(tensors: Tensors) -> Iterator[str]:
    for name in list(tensors):
        if found := re.fullmatch(r"(blocks\.\d+)\.attn\.qkv\.weight", name):
            yield found[1]


def _is_square(count: int) -> bool:
    return count > 1 and math.isqrt(count) ** 2 == count


def _complete_bias(tensors: dict[str, Tensor], prefix: str, without: bool) -> None:
    """Join or add the bias of queries, keys and values; `without` says that no block has any."""
    weight, name = tensors[f"{prefix}qkv.weight"], f"{prefix}qkv.bias"
    mask = tensors.pop(f"{prefix}qkv.bias_mask", None)
    q, v = (tensors.pop(f"{prefix}{part}_bias", None) for part in "qv")
    if weight.ndim != 2 or weight.shape[0] % 3:
        return  # a strict load names its shape
    if q is not None and v is not None and name not in tensors:
        tensors[name] = torch.cat([q, torch.zeros_like(q), v])
    if without:
        tensors[name] = weight.new_zeros(len(weight))
    bias = tensors.get(name)
    if mask is not None and bias is not None:
        if not torch.equal(mask.float().cpu(), key_mask(len(weight))):
            raise UserError(f"its {prefix}qkv.bias_mask masks something else than the keys")
        tensors[name] = bias * mask


def key_mask(rows: int) -> Tensor:
    """1 for the rows of queries and values, 0 for those of keys."""
    return torch.cat([torch.full((rows // 3,), value) for value in (1.0, 0.0, 1.0)])


def has_key_bias(tensors: Tensors) -> bool:
    """Whether any key of a ViT (dino's names) has a bias that is not 0."""
    biases = (tensors.get(f"{block}.attn.qkv.bias") for block in _blocks(tensors))
    return any(bias is not None and bool(bias.chunk(3)[1].any()) for bias in biases)


def with_shape_of_scales(tensors: Tensors, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """ConvNeXt's layer scales, [D] in other libraries and [D, 1, 1] in torchvision, reshaped."""
    return {
        name: tensor.reshape(shape) if name.endswith("layer_scale") else tensor
        for name, tensor in tensors.items()
    }


# ------------------------------------------------------------------------------------ writing
def as_written_by(
    dialect: str, family: str, tensors: Tensors, spec: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A ViT's tensors, still under dino's names, with what a library of this family expects.

    Args:
        dialect: official, timm or transformers.
        family: one of `key_maps.DINO_VITS`.
        tensors: a state dict of `dino.models.vit`.
        spec: the arguments of `dino.create`.
    """
    found, rotary = dict(tensors), family.startswith("dinov3")
    keys = spec.get("key_bias", True)
    dim = found["cls_token"].shape[2]
    if dialect != "official":
        for block in _blocks(found):
            for name in ("ls1", "ls2"):
                found.setdefault(f"{block}.{name}.gamma", torch.ones(dim))
    if dialect.startswith("transformers"):
        shape = (1, 1, dim) if rotary else (1, dim)
        found["embeddings.mask_token"] = torch.zeros(shape)
        if rotary:
            found.setdefault("register_tokens", torch.zeros(1, 0, dim))
    if dialect == "official":
        found["mask_token"] = torch.zeros(1, dim)
    elif rotary:
        del found["rope_embed.periods"]
    if dialect == "timm" and "register_tokens" in found and "pos_embed" in found:
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    for block in _blocks(found):
        if not keys:
            name = f"{block}.attn.qkv.bias"
            found[name] = found[name] * key_mask(3 * dim)
        if rotary and not keys:
            _write_bias(dialect, found, f"{block}.attn.")
    if dialect == "timm" and rotary and not keys and not has_bias(tensors):
        found = {n: t for n, t in found.items() if not n.endswith(("q_bias", "v_bias"))}
    return found


def has_bias(tensors: Tensors) -> bool:
    """Whether any query or value of a ViT (dino's names) has a bias that is not 0."""
    biases = (tensors[f"{block}.attn.qkv.bias"] for block in _blocks(tensors))
    return any(bool((bias * key_mask(len(bias))).any()) for bias in biases)


def _write_bias(dialect: str, tensors: dict[str, Tensor], prefix: str) -> None:
    """A bias of queries and values alone, as the official code, timm and transformers have it."""
    bias = tensors[f"{prefix}qkv.bias"]
    if dialect == "official":
        tensors[f"{prefix}qkv.bias_mask"] = key_mask(len(bias))
    elif dialect == "timm":
        tensors[f"{prefix}q_bias"], _, tensors[f"{prefix}v_bias"] = bias.chunk(3)
        del tensors[f"{prefix}qkv.bias"]
