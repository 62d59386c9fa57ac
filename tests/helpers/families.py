"""Networks of the DINO family with random parameters, built by timm and transformers.

Also the official files of the same networks: their names, written here key by key, apart from the
tables of the package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
HF_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PHOTO_CONFIG = {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "dinov2 giant registers": ("vit_giant_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "dinov3 bias": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64}),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3_qkvb", {"img_size": 64}),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}),
}
"""timm's names and arguments by what they are."""

HF: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", {**HF_SMALL, "image_size": 56, "patch_size": 14}),
    "dinov2 registers": (
        "Dinov2WithRegisters",
        {**HF_SMALL, "image_size": 56, "patch_size": 14, "num_register_tokens": 3},
    ),
    "dinov2 giant": (
        "Dinov2",
        {**HF_SMALL, "image_size": 56, "patch_size": 14, "use_swiglu_ffn": True},
    ),
    "dinov3": (
        "DINOv3ViT",
        {**HF_SMALL, "image_size": 64, "intermediate_size": 64, "num_register_tokens": 4},
    ),
    "dinov3 plus": (
        "DINOv3ViT",
        {
            **HF_SMALL,
            **{"image_size": 64, "intermediate_size": 64, "num_register_tokens": 4},
            **{"use_gated_mlp": True, "hidden_act": "silu"},
        },
    ),
    "dinov3 variant": (  # none was published
        "DINOv3ViT",
        {
            **HF_SMALL,
            **{"image_size": 64, "intermediate_size": 64, "num_register_tokens": 0},
            **{"key_bias": True, "rope_theta": 30.0},
        },
    ),
    "convnext": ("DINOv3ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "deit": ("DeiT", {**HF_SMALL, "image_size": 56, "patch_size": 14, "intermediate_size": 64}),
    "mae": (
        "ViTMAE",
        {
            **HF_SMALL,
            **{"image_size": 56, "patch_size": 14, "intermediate_size": 64, "mask_ratio": 0.0},
        },
    ),
    "msn": ("ViTMSN", {**HF_SMALL, "image_size": 56, "patch_size": 14, "intermediate_size": 64}),
}
"""Classes of transformers, less Model and Config, and the settings of small ones."""


def scrambled(module: nn.Module) -> Any:
    """Random parameters of a size at which each of them matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point() and tensor.numel():
            spread = 0.5 if tensor.ndim == 1 else 1.5 * tensor[0].numel() ** -0.5
            tensor.normal_(0, spread, generator=generator)
    return module.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value; features must differ, too."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    """A cosine of at least .99999 and a relative difference of at most 1e-5."""
    assert relative(ours, theirs) <= 1e-5
    assert F.cosine_similarity(ours, theirs, dim=-1).min() >= 0.99999


# ------------------------------------------------------------------------------------ builders
def build_timm(kind: str, **arguments: Any) -> Any:
    """timm's network of `TIMM`, for images of any size, with the CLS token as its feature."""
    timm = pytest.importorskip("timm")
    name, known = TIMM[kind]
    sizes = {} if kind == "convnext" else SMALL
    usual: dict[str, Any] = {} if kind == "convnext" else {"dynamic_img_size": True}
    if kind.startswith("dinov3"):
        usual["global_pool"] = "token"
    arguments = {**sizes, **known, **usual, **arguments}
    return scrambled(timm.create_model(name, num_classes=0, **arguments))


def timm_folder(folder: Path, kind: str, network: Any) -> Path:
    """`network` as timm's hub folders hold it: with its name, arguments and transform."""
    name, known = TIMM[kind]
    size = known.get("img_size", 96)
    config = {
        "architecture": name,
        "model_args": {**({} if kind == "convnext" else SMALL), **known},
        "pretrained_cfg": {
            **{"input_size": [3, size, size], **PHOTO_CONFIG, **IMAGENET},
            "first_conv": network.pretrained_cfg["first_conv"],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_hf(kind: str) -> Any:
    """transformers' network of `HF`."""
    transformers = pytest.importorskip("transformers")
    name, settings = HF[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    return scrambled(getattr(transformers, f"{name}Model")(config))


def hf_features(kind: str, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The feature and the patch tokens [B, N, D] of a network of `HF`."""
    options: dict[str, Any] = {}
    if kind in ("deit", "mae", "msn"):
        options["interpolate_pos_encoding"] = True
    count = (images.shape[2] // 14) * (images.shape[3] // 14)
    if kind == "mae":  # it shuffles its patches by this noise
        options["noise"] = torch.arange(count).float().expand(len(images), -1)
    tokens = network(images, **options).last_hidden_state
    prefix = {"deit": 2}.get(kind, 1 + HF[kind][1].get("num_register_tokens", 0))
    return tokens[:, 0], tokens[:, prefix:]


# ------------------------------------------------------------------------------------ official
def official(kind: str, network: Any) -> dict[str, Tensor]:
    """timm's network of `TIMM` under the names, and with the extra tensors, of the official file.

    DINOv2's blocks are chunked by two, as its pretraining writes them.
    """
    found: dict[str, Tensor] = {}
    state = network.state_dict()
    for name, tensor in state.items():
        found[_OFFICIAL_NAMES[kind.split()[0]](name, kind)] = tensor
    if kind == "convnext":
        norm = {"norms.3.weight": found["norm.weight"], "norms.3.bias": found["norm.bias"]}
        return {**found, **norm}
    found["mask_token"] = torch.randn(1, 32)
    if kind.startswith("dinov2") and "reg_token" in state:  # timm adds CLS's position to its token
        place = torch.randn(1, 1, 32)
        found["cls_token"] = state["cls_token"] - place
        found["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    if kind.startswith("dinov3"):
        found["rope_embed.periods"] = 100 ** (torch.arange(4) / 4)
        found["local_cls_norm.weight"] = found["local_cls_norm.bias"] = torch.randn(32)
        for block in range(2):
            attn = f"blocks.{block}.attn."
            zero = torch.zeros(32)
            q, v = (found.pop(f"{attn}{part}_bias", zero) for part in "qv")
            masked = torch.randn(32)  # of the keys, which the mask takes away
            found[f"{attn}qkv.bias"] = torch.cat([q, masked, v])
            found[f"{attn}qkv.bias_mask"] = torch.cat([zero + 1, zero, zero + 1])
    return found


def _dinov2(name: str, kind: str) -> str:
    name = re.sub(r"^blocks\.(\d+)\.", lambda found: f"blocks.{found[1]}.{found[1]}.", name)
    if "giant" in kind:
        name = name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
    return name.replace("reg_token", "register_tokens")


def _dinov3(name: str, kind: str) -> str:
    name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
    if "plus" in kind:
        for theirs, officials in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
            name = name.replace(f"mlp.{theirs}.", f"mlp.{officials}.")
    return name.replace("reg_token", "storage_tokens")


def _convnext(name: str, kind: str) -> str:
    name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
    name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv")
    return name.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")


_OFFICIAL_NAMES = {"dinov2": _dinov2, "dinov3": _dinov3, "convnext": _convnext}


def with_offset(network: Any, height: int, width: int) -> Any:
    """timm's DINOv2 for images of one size, its positions resampled as DINOv2's own code does.

    That is, without registers: bicubic, by the scale factor of the grid plus .1.
    """
    state, grid = network.state_dict(), (height // 14, width // 14)
    side = round(state["pos_embed"][:, 1:].shape[1] ** 0.5)
    if grid != (side, side):
        image = state["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        rows = image.permute(0, 2, 3, 1).flatten(1, 2)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], rows], dim=1)
    kind = "dinov2 giant" if "blocks.0.mlp.fc1.weight" in state and _is_packed(state) else "dinov2"
    fixed = build_timm(kind, img_size=(height, width), dynamic_img_size=False)
    fixed.load_state_dict(state)
    return fixed


def _is_packed(state: dict[str, Tensor]) -> bool:
    return len(state["blocks.0.mlp.fc1.weight"]) != state["blocks.0.mlp.fc2.weight"].shape[1]
