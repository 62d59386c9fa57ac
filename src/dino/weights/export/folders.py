"""Folders of timm and transformers: `config.json`, `model.safetensors`, their transform.

Neither library is needed to write them. Values are those of the weights, bit for bit, unless
another image size is requested: then the position embedding is resampled for it.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, replacing, sync_file, sync_folder
from dino.models.backbone import Backbone
from dino.weights.export.graph import fixed
from dino.weights.export.model_card import FormatNotes
from dino.weights.key_maps import from_dino

FILES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json", "README.md"})
"""All that an exported folder ever holds; a folder that holds anything else is not replaced."""

TIMM_USE = """
import json
from pathlib import Path

import timm
from PIL import Image

folder = Path({folder})
config = json.loads((folder / "config.json").read_text())
backbone = timm.create_model(
    config["architecture"],
    num_classes=0,
    checkpoint_path=str(folder / "model.safetensors"),
    **config["model_args"],
).eval()
settings = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
image = timm.data.create_transform(**settings)(Image.open("picture.jpg").convert("RGB"))
feature = backbone(image[None])  # [1, {width}]
"""

TRANSFORMERS_USE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

backbone = AutoModel.from_pretrained({folder}).eval()
processor = AutoImageProcessor.from_pretrained({folder}, backend="pil")
output = backbone(**processor(Image.open("picture.jpg"), return_tensors="pt"))
feature = output.last_hidden_state[:, 0]  # [1, {width}], the CLS token
patches = output.last_hidden_state[:, 1:]  # [1, patches, {width}]
"""


def sized(preprocessing: Preprocessing, size: int) -> Preprocessing:
    """The same transform for squares of `size` px: resize and crop keep their proportion."""
    return replace(
        preprocessing, resize=round(size * preprocessing.resize / preprocessing.crop), crop=size
    )


# ------------------------------------------------------------------------------------ timm
def timm_folder(folder: Path, backbone: Backbone, size: int, about: dict[str, Any]) -> FormatNotes:
    """Write a network as timm's hub folders are; `timm.create_model` builds and loads it.

    Args:
        folder: an empty folder to fill, under the name that it will have.
        backbone: any network of dino.
        size: side of the images in pixels.
        about: JSON values for the metadata of the weights.

    Raises:
        UserError: for a ViT whose layer norms have another epsilon than all of timm's.
    """
    twin = fixed(backbone, (size, size))
    preprocessing = sized(backbone.preprocessing, size)
    architecture, arguments = twin.timm_arguments(size)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": twin.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], size, size],
            "crop_pct": _crop_share(preprocessing),
            "crop_mode": "squash" if preprocessing.squash else "center",
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "first_conv": twin.first_layer.removeprefix("network.").removesuffix(".weight"),
            "classifier": None,
        },
    }
    _write(folder / "config.json", config)
    save_tensors(
        folder / "model.safetensors", from_dino(twin.state_dict(), "timm", twin.spec), about
    )
    usage = TIMM_USE.format(folder=json.dumps(folder.name), width=twin.embed_dim)
    notes: tuple[str, ...] = (
        'Newer timm also takes `timm.create_model("local-dir:FOLDER", pretrained=True)`.',
    )
    if twin.position is not None:
        notes += (
            f"Made for images of {size} x {size} px, where its features are those of the weights. "
            "With `dynamic_img_size=True` timm takes other sizes too, but resamples the position "
            "embedding in its own way (antialiased): export with `--size` for the exact features.",
        )
    return FormatNotes("a folder for timm", usage, preprocessing, notes, library="timm")


def _crop_share(preprocessing: Preprocessing) -> float:
    """The `crop_pct` from which timm computes our resize: floor(crop / crop_pct)."""
    share = preprocessing.crop / preprocessing.resize
    while math.floor(preprocessing.crop / share) < preprocessing.resize:
        share = math.nextafter(share, 0)
    return share


# ------------------------------------------------------------------------------------ transformers
def transformers_folder(
    folder: Path, backbone: Backbone, size: int, about: dict[str, Any]
) -> FormatNotes:
    """Write a ViT as transformers does; `AutoModel` and `AutoImageProcessor` open it.

    `AutoModel` adds a pooler to a ViT and would draw its weights at random. The file holds one
    that changes nothing (identity, no bias, no activation), so `pooler_output` is the feature too.

    Args:
        folder: an empty folder to fill, under the name that it will have.
        backbone: a ViT of dino.
        size: side of the images in pixels.
        about: JSON values for the metadata of the weights.

    Raises:
        UserError: for other networks.
    """
    twin = fixed(backbone, (size, size))
    config = twin.transformers_config(size)
    preprocessing = sized(backbone.preprocessing, size)
    tensors = from_dino(twin.state_dict(), "transformers", twin.spec)
    tensors["pooler.dense.weight"] = torch.eye(twin.embed_dim)
    tensors["pooler.dense.bias"] = torch.zeros(twin.embed_dim)
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", _processor(preprocessing, twin))
    about = {**about, "spec": twin.spec, "preprocessing": preprocessing.to_dict()}
    save_tensors(folder / "model.safetensors", tensors, about)
    notes = (
        "`pooler_output` is the same feature (before transformers 4.51 it is the tanh of it).",
        f"Made for images of {size} x {size} px; for others export with `--size`, or give "
        "`interpolate_pos_encoding=True`, which resamples positions as `exact` does.",
        "For one aspect ratio in four the processor crops one pixel beside torchvision's crop.",
    )
    usage = TRANSFORMERS_USE.format(folder=json.dumps(folder.name), width=twin.embed_dim)
    title = "a folder for transformers"
    return FormatNotes(title, usage, preprocessing, notes, library="transformers")


def _processor(preprocessing: Preprocessing, backbone: Backbone) -> dict[str, Any]:
    """BiT's processor is the plain one: shorter side, central crop, mean and deviation."""
    side, crop = preprocessing.resize, preprocessing.crop
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": backbone.channels == 3,
        "do_resize": True,
        "size": {"height": side, "width": side}
        if preprocessing.squash
        else {"shortest_edge": side},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


# ------------------------------------------------------------------------------------ files
def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors in another library's layout, with metadata.

    transformers needs `format`; `dino_export` holds what tensors do not show (heads, position)
    and the preprocessing for `dino.load`.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", "dino_export": json.dumps(about)})


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder of the same name elsewhere; on success it takes the place of `folder`.

    Raises:
        UserError: if `folder` exists and is not an export, or holds anything but one.
    """
    folder = folder.absolute()
    if folder.exists():
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if held and not (held <= FILES and "README.md" in held):
            raise UserError(f"{folder} exists and is no export of dino: choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    new, former = workspace / folder.name, workspace / f"former {folder.name}"
    try:
        new.mkdir()
        yield new
        for path in new.iterdir():
            sync_file(path)
        sync_folder(new)
        if folder.exists():
            folder.rename(former)
        try:
            new.rename(folder)
        except OSError:
            if former.exists():
                former.rename(folder)
            raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
