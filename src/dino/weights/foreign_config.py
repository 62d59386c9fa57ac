"""What the files of other libraries say beside their tensors: which network, which transform.

Positions are resampled as the library does it where the weights come from: transformers asks for
the size itself (our `exact`), timm does so too but antialiases, the published code is `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.vit import SIZES
from dino.weights.files import Container
from dino.weights.key_maps import Layout, covers, detect, layout_of

TIMM_ARGUMENTS = {"img_size", "in_chans", "num_classes", "dynamic_img_size", "global_pool"}
"""Arguments of `timm.create_model` that our networks of timm follow (the usual pooling only)."""
TIMM_VIT_ARGUMENTS = {*TIMM_ARGUMENTS, "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}
"""Those of its ViTs whose effect shows in the tensors, or in `hints_of`."""


def find_layout(tensors: Mapping[str, Tensor], container: Container) -> Layout:
    """The layout of a state dict, by its keys and by its folder's configuration.

    Raises:
        UserError: if dino knows no such network.
    """
    path, config = container.path, container.config
    kind, activation = config.get("model_type", "vit"), config.get("hidden_act", "gelu")
    if kind != "vit" or activation != "gelu":
        what = kind if kind != "vit" else f"vit with {activation}"
        raise UserError(f"{path} is another model of transformers ({what}) than ViTModel with gelu")
    layout = detect(tensors)
    if "architecture" in config:
        return _layout_of_timm(tensors, container, layout)
    if layout is not None:
        return layout
    if any(name.endswith("linear.weight") for name in tensors):
        raise UserError(
            f"{path} is a linear classifier, not a network: it is for `dino evaluate linear`"
        )
    first = ", ".join(sorted(tensors)[:3])
    raise UserError(f"{path} holds no network that dino knows: its first keys are {first}")


def hints_of(container: Container, layout: Layout) -> dict[str, Any]:
    """What tensors cannot tell: see `architecture.spec_of`."""
    noted = _noted(container)
    if layout.dialect.startswith("transformers"):
        return {
            "heads": container.config.get("num_attention_heads"),
            "norm_eps": container.config.get("layer_norm_eps", 1e-12),  # ViTConfig's default
            "position": "exact",
            **noted,
        }
    if layout.dialect != "timm":
        return noted
    arguments = container.config.get("model_args", {})
    said = {"image_size": "img_size", "channels": "in_chans", "heads": "num_heads"}
    hints = {
        "name": container.config["architecture"],
        "position": "exact",
        **{ours: _side(arguments[name]) for ours, name in said.items() if name in arguments},
    }
    if (network := _build_timm(container)) is not None and layout.family == "vit":
        hints |= {"heads": network.blocks[0].attn.num_heads, "norm_eps": network.norm.eps}
    return {**hints, **noted}


def preprocessing_of(
    container: Container, layout: Layout, spec: Mapping[str, Any]
) -> Preprocessing:
    """The transform that belongs to foreign weights; the paper's where nothing is said.

    Raises:
        UserError: if it is one that `Preprocessing` does not have.
    """
    found = None
    if layout.dialect == "timm":
        found = of_timm(container.config)
    elif layout.dialect.startswith("transformers"):
        found = of_transformers(container.preprocessor)
    elif noted := container.exported().get("preprocessing"):
        found = Preprocessing.from_dict(noted)
    return found or Preprocessing.for_size(spec.get("image_size", 224))


def _noted(container: Container) -> dict[str, Any]:
    """Hints that `dino export` wrote into the file."""
    spec = container.exported().get("spec", {})
    full = {**SIZES.get(spec.get("arch"), {}), **spec}
    return {key: full[key] for key in ("heads", "norm_eps", "position") if key in full}


# ------------------------------------------------------------------------------------ timm
def _layout_of_timm(
    tensors: Mapping[str, Tensor], container: Container, found: Layout | None
) -> Layout:
    """One of our own networks if it is one of them to the last key, else timm's own."""
    arguments = set(container.config.get("model_args", {}))
    family = found.family if found is not None else "timm"
    own = family in ("vit", "resnet50") and covers(layout_of("timm", family), tensors)
    if own and family == "vit":
        own = arguments <= TIMM_VIT_ARGUMENTS and _is_plain(_build_timm(container))
    if own:
        return layout_of("timm", family)
    unknown = sorted(arguments - TIMM_ARGUMENTS)
    if "global_pool" in arguments and not _pools_as_usual(container):
        unknown.append("global_pool")
    if unknown:
        raise UserError(
            f"{container.path} was made with arguments of timm that dino does not follow: "
            f"{', '.join(unknown)}"
        )
    classifier = container.config.get("pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return replace(layout_of("timm", "timm"), left_out=tuple(f"{name}.{{}}" for name in names))


def _side(value: Any) -> Any:
    """A size that timm may write as two equal numbers."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"its images of {value} px are not square")
        return value[0]
    return value


def _pools_as_usual(container: Container) -> bool:
    """Whether a network of timm's pools as its name alone says, which is how we build it."""
    usual = _build_timm(replace(container, config={**container.config, "model_args": {}}))
    return usual is not None and _pool(usual) == container.config["model_args"]["global_pool"]


def _pool(network: nn.Module) -> str | None:
    for holder in (network, getattr(network, "head", None)):
        pool = getattr(holder, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(kind, str):
            return kind
    return None


def _build_timm(container: Container) -> Any:
    """The network as timm builds it, without memory; None where timm is not installed."""
    name, given = container.config["architecture"], container.config.get("model_args", {})
    arguments = {key: given[key] for key in TIMM_VIT_ARGUMENTS & given.keys()}  # no files, no URLs
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        raise UserError(f"{container.path} names {name}, which the installed timm does not have")
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def _is_plain(network: Any) -> bool:
    """Whether a ViT of timm's computes what ours does: CLS token, exact GELU. Unknown is yes."""
    if network is None:
        return True
    if type(network).__name__ != "VisionTransformer" or network.global_pool != "token":
        return False
    act = network.blocks[0].mlp.act
    return isinstance(act, nn.GELU) and act.approximate == "none"


# ------------------------------------------------------------------------------------ transforms
_PILLOW: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}


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
    return Preprocessing(
        resize=math.floor(height / given.get("crop_pct", 0.875)),
        crop=height,
        mean=tuple(given.get("mean", IMAGENET_MEAN)),
        std=tuple(given.get("std", IMAGENET_STD)),
        interpolation=_interpolation(given.get("interpolation", "bicubic")),
        squash=mode == "squash",
    )


def of_transformers(config: Mapping[str, Any]) -> Preprocessing | None:
    """The transform of a `preprocessor_config.json`; None where there is none.

    `ViTImageProcessor` resizes both sides to `size`, bilinear unless told otherwise, and does not
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
    return Preprocessing(
        resize=resize,
        crop=crop,
        mean=tuple(config.get("image_mean", IMAGENET_MEAN)),
        std=tuple(config.get("image_std", IMAGENET_STD)),
        interpolation=_interpolation(_PILLOW.get(config.get("resample", 2), "another")),
        squash=squash,
    )


def _interpolation(name: str) -> Literal["bicubic", "bilinear"]:
    if name == "bicubic":
        return "bicubic"
    if name == "bilinear":
        return "bilinear"
    raise UserError(f"its transform interpolates by {name}, dino by bicubic or bilinear")
