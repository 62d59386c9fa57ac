"""What the files of other libraries state beside their tensors: which network, which transform.

Positions are resampled as in the library that the weights come from: transformers resamples to the
size itself (`exact`), save DINOv2's with registers, which it antialiases as timm does everywhere
(`antialias`); the published code is `reference`, DINOv2's with registers `antialias`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.create import create
from dino.models.rope import BASE
from dino.models.vit import SIZES
from dino.weights.adapt import for_channels
from dino.weights.files import Container, shown
from dino.weights.infer_spec import Spec, spec_of, with_periods
from dino.weights.key_maps import (
    VITS,
    Layout,
    Tensors,
    detect,
    family_of,
    from_dino,
    layout_of,
    to_dino,
)

TIMM_ARGUMENTS = {"img_size", "in_chans", "num_classes", "dynamic_img_size"}
"""Arguments of `timm.create_model` that `dino.create("timm:...")` supports."""
TIMM_VIT_ARGUMENTS = TIMM_ARGUMENTS | {
    *("global_pool", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    *("init_values", "reg_tokens", "num_reg_tokens", "no_embed_class"),
    *("swiglu_mlp", "swiglu_align_to", "depths", "dims"),
}
"""Arguments with which timm's network is built to compare it with dino's."""
PLAIN = {
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn"), "exact"),
    **{"dinov2": "exact", "dinov2_with_registers": "antialias"},
    **dict.fromkeys(("dinov3_vit", "dinov3_convnext"), None),
}
"""Kinds of models of transformers (`model_type`) that are dino's networks, and how they resample
their position embedding."""
NORM_EPS = {"dinov2": 1e-6, "dinov2_with_registers": 1e-6, "vit_msn": 1e-6, "dinov3_vit": 1e-5}
"""Epsilon of the norms of these kinds where a configuration states none; else 1e-12."""
TRIED = 256
"""Pixels a side of the largest image on which timm's ViT and dino's are compared."""
DINOV3 = Preprocessing(256, 256, interpolation="bilinear", squash=True)
"""The transform of DINOv3's README, for files that state none."""
TOLERANCE = 2e-5
"""Largest difference of two features that are computed alike, relative to the largest value."""


def find_layout(tensors: Tensors, container: Container) -> Layout:
    """The layout of a state dict, by its keys and by its folder's configuration.

    Raises:
        UserError: if dino knows no such network.
    """
    path, config = container.path, container.config
    kind, activation = config.get("model_type", "vit"), config.get("hidden_act", "gelu")
    known = "silu" if config.get("use_gated_mlp") else "gelu"
    if kind not in PLAIN:
        raise UserError(
            f"{path} is transformers' {shown(kind)}, which is none of dino's networks "
            f"({', '.join(PLAIN)}): a folder of timm with these weights loads as timm's own"
        )
    if activation != known and not config.get("use_swiglu_ffn"):
        raise UserError(
            f"{path} is transformers' {kind} with {shown(activation)}, which dino computes with "
            f"{known} only"
        )
    name, arguments = config.get("architecture", ""), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{path}: its config.json is damaged (architecture, model_args)")
    if arguments.get("depth", 0) > len(tensors):  # building it would never end
        raise UserError(f"{path} holds too few tensors for {arguments['depth']:,} blocks")
    layout = detect(tensors)
    if "architecture" in config:
        return _timm_layout(tensors, container, layout)
    if layout is not None:
        return layout
    first = ", ".join(shown(name) for name in sorted(tensors)[:3])
    raise UserError(f"{path} holds no network that dino knows: its first keys are {first}")


_USUAL_KIND = {
    **dict.fromkeys(("dinov2", "dinov2_swiglu"), "dinov2"),
    **dict.fromkeys(("dinov3", "dinov3_swiglu"), "dinov3_vit"),
}


def hints_of(container: Container, layout: Layout, tensors: Tensors) -> dict[str, Any]:
    """What tensors (under dino's names) do not show: see `infer_spec.spec_of`."""
    exported = container.exported.get("spec", {})
    exported = {**SIZES.get(exported.get("arch"), {}), **exported}
    known = {key: exported[key] for key in ("heads", "norm_eps", "position") if key in exported}
    if layout.dialect.startswith("transformers"):
        config = container.config
        kind = config.get("model_type", _USUAL_KIND.get(layout.family, "vit"))
        learned = layout.family.startswith("dinov2")
        if "model_type" not in config and learned and "register_tokens" in tensors:
            kind = "dinov2_with_registers"
        size = config.get("image_size")
        stated = {"image_size": size} if isinstance(size, int) else {}
        return {
            "heads": config.get("num_attention_heads"),
            "norm_eps": config.get("layer_norm_eps", NORM_EPS.get(kind, 1e-12)),
            "position": PLAIN[kind],
            "rope_base": config.get("rope_theta", BASE),
            **stated,
            **known,
        }
    if layout.dialect != "timm" or "architecture" not in container.config:  # names alone
        timms = {"position": "antialias"} if layout.dialect == "timm" else {}
        usual = {"norm_eps": 1e-5} if layout.family.startswith("dinov3") else {}
        return {**timms, **usual, **known}
    hints = {"name": container.config["architecture"], "position": "antialias"}
    hints["channels"] = container.config.get("model_args", {}).get("in_chans", 3)
    network = _build_timm(container)
    if size := getattr(getattr(network, "patch_embed", None), "img_size", None):
        hints["image_size"] = size[0] if isinstance(size, tuple) else size
        if isinstance(size, tuple) and len(set(size)) > 1:
            raise UserError(f"its images of {size} px are not square")
    if network is not None and layout.family in VITS:
        hints |= {"heads": network.blocks[0].attn.num_heads, "norm_eps": network.norm.eps}
    return {**hints, **known}


def preprocessing_of(
    container: Container, layout: Layout, spec: Spec
) -> tuple[Preprocessing, list[str]]:
    """The transform that belongs to foreign weights, and what was assumed.

    It is the paper's where the files state none.

    Raises:
        UserError: if it is one that `Preprocessing` does not have.
    """
    found = None
    try:
        if layout.dialect == "timm" and "architecture" in container.config:
            network = _build_timm(container)
            found = of_timm(container.config) or of_timm(getattr(network, "pretrained_cfg", {}))
        elif layout.dialect.startswith("transformers"):
            found = of_transformers(container.preprocessor)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"its transform is damaged ({error!r})") from None
    if exported := container.exported.get("preprocessing"):
        ours = Preprocessing.from_dict(exported)
        found = ours if found is None else replace(found, pixels=ours.pixels)
    if found is None and layout.family.startswith(("dinov3", "convnext")):
        found = DINOV3
    size = 224 if "layer_scale" in spec else spec.get("image_size", 224)
    found = found or Preprocessing.for_size(size)
    channels = spec.get("channels", 3)
    stated = channels == len(found.mean) == len(found.std)
    if stated and channels == found.pixels.channels:
        return found, []
    note = (
        f"images of {channels} channels: mean and deviation of {len(found.mean)} channels are "
        "used for them, see preprocessing"
    )
    return for_channels(found, channels), [] if stated else [note]


# ------------------------------------------------------------------------------------ timm
def timm_config(name: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint with a timm architecture's name and training arguments."""
    try:
        import timm

        known = timm.is_model(name)
    except ImportError:
        known = stated.get("model") == name  # as timm's training script writes it
    if not known:
        return {}
    names = {"gp": "global_pool", "img_size": "img_size", "in_chans": "in_chans"}
    given = {name: stated[key] for key, name in names.items() if stated.get(key) is not None}
    return {"architecture": name, "model_args": {**given, **(stated.get("model_kwargs") or {})}}


def _timm_layout(tensors: Tensors, container: Container, found: Layout | None) -> Layout:
    """The layout of dino's ViT or ResNet-50 if timm's network computes the same, else timm's."""
    if found is not None and found.family in (*VITS, "resnet", "convnext"):
        families = VITS if found.family in VITS else (found.family,)
        for layout in (layout_of("timm", family) for family in families):
            if _computes_like_dino(tensors, container, layout):
                return layout
    if unknown := sorted(container.config.get("model_args", {}).keys() - TIMM_ARGUMENTS):
        raise UserError(
            f"{container.path} was made with arguments of timm that dino does not support: "
            f"{', '.join(unknown)}"
        )
    classifier = container.config.get("pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return replace(layout_of("timm", "timm"), ignored=tuple(f"{name}.{{}}" for name in names))


def _computes_like_dino(tensors: Tensors, container: Container, layout: Layout) -> bool:
    """Whether dino's network of the same keys gives the feature of timm's, tried on one image.

    Keys and shapes cannot show that: resnetaa50 has those of ResNet-50 and pools otherwise.
    """
    if exported := container.exported.get("spec"):  # written by `dino export`
        return family_of(exported, "timm") == layout.family
    if not container.config.get("model_args", {}).keys() <= TIMM_VIT_ARGUMENTS:
        return False
    theirs = _build_timm(container)
    if theirs is None:
        name = container.config["architecture"]
        raise UserError(f"{container.path} holds timm's {name}: pip install dino-ssl[timm]")
    try:
        named, _ = to_dino(tensors, layout)
        named = {n: t.float() if t.is_floating_point() else t for n, t in named.items()}
        spec, _ = spec_of(layout.family, named, hints_of(container, layout, named))
        named = with_periods(named, spec)
        with torch.device("meta"):
            ours = create(**spec)
        ours.load_state_dict(named, strict=True, assign=True)
        written = from_dino(named, "timm", spec)
        if layout.family.startswith("dinov3"):  # rotations are no tensors of the file
            theirs = _build_timm(container, device="cpu", global_pool="token")
        side = spec.get("image_size", 64)
        if layout.family in VITS and spec["position"] != "rope" and side > TRIED:
            theirs = _build_timm(container, dynamic_img_size=True)
            side = TRIED // spec["patch_size"] * spec["patch_size"]
        theirs.load_state_dict(written, strict=True, assign=True)
        shape = (1, spec.get("channels", 3), side, side)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            found, expected = ours.eval()(image), theirs.eval()(image)
    except (UserError, RuntimeError, AttributeError):  # other keys, shapes or modules
        return False
    same = found.shape == expected.shape
    return same and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _build_timm(container: Container, device: str = "meta", **usual: Any) -> Any:
    """The network as timm builds it, by default without memory; None where timm is not installed.

    `usual` are arguments unless the configuration states them.
    """
    name, given = container.config["architecture"], container.config.get("model_args", {})
    arguments = usual | {key: given[key] for key in TIMM_VIT_ARGUMENTS & given.keys()}  # no URLs
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        raise UserError(f"{container.path} names {name}, which the installed timm does not have")
    try:
        with torch.device(device):
            return timm.create_model(name, **{**arguments, "num_classes": 0})
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"timm cannot build its {name} ({shown(str(error))}): correct config.json"
        ) from None


# ------------------------------------------------------------------------------------ transforms
def of_timm(config: Mapping[str, Any]) -> Preprocessing | None:
    """The evaluation transform of timm's `pretrained_cfg`; None where there is none.

    The image is resized to floor(size / crop_pct), its shorter side in mode "center" and both in
    mode "squash", then cropped.

    Raises:
        UserError: for a mode, size or interpolation that `Preprocessing` does not have.
    """
    given = config.get("pretrained_cfg", config)
    if "input_size" not in given:
        return None
    _, height, width = given["input_size"]
    mode = given.get("crop_mode", "center")
    if height != width or mode not in ("center", "squash"):
        raise UserError(f"its transform ({mode}, {height} x {width} px) is none of dino's")
    stated = {key: given[key] for key in ("mean", "std", "interpolation") if key in given}
    resize = math.floor(height / given.get("crop_pct", 0.875))
    return Preprocessing.from_dict(
        {"resize": resize, "crop": height, "squash": mode == "squash", **stated}
    )


def of_transformers(config: Mapping[str, Any]) -> Preprocessing | None:
    """The transform of a `preprocessor_config.json`; None where there is none.

    `ViTImageProcessor` resizes both sides to `size`, bilinear by default, and does not
    crop; other processors resize the shorter side and crop the center.

    Raises:
        UserError: for what `Preprocessing` does not have.
    """
    if not config:
        return None
    if config.get("do_resize") is False or config.get("do_normalize") is False:
        raise UserError("its transform does not resize or not normalise, which is none of dino's")
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise UserError(f"its transform rescales by {config['rescale_factor']}, not by 1 / 255")
    size = config.get("size", 224)
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    squash = "shortest_edge" not in sides
    resize = sides.get("shortest_edge", sides.get("height"))
    if resize is None or (squash and sides.get("width") != resize):
        raise UserError(f"its transform resizes to {size}, which is none of dino's")
    crop = resize
    if config.get("do_center_crop"):
        given = config.get("crop_size", resize)
        crop = given["height"] if isinstance(given, dict) else given
    elif not squash:
        raise UserError("its transform keeps the aspect ratio and does not crop")
    stated = {key: config[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in config}
    pillow = {2: "bilinear", 3: "bicubic"}  # its numbers
    stated["interpolation"] = pillow.get(config.get("resample", 2), "another filter")
    return Preprocessing.from_dict({"resize": resize, "crop": crop, "squash": squash, **stated})
