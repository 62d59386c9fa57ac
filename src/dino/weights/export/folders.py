"""Folders of timm and transformers: `config.json`, `model.safetensors`, their transform.

Neither library is needed to write them. Values are those of the weights, bit for bit, unless
another image size is requested: then the position embedding is resampled for it.
"""

from __future__ import annotations

import json
import math
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
from dino.files import replacing, sync_file, sync_folder
from dino.models.backbone import Backbone
from dino.weights.export.graph import fixed
from dino.weights.export.model_card import FormatNotes
from dino.weights.key_maps import from_dino

FILES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json", "README.md"})
"""All files of an exported folder; a folder with any other is not replaced."""

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
feature = backbone(image[None])  # [1, {embed_dim}]
"""

TRANSFORMERS_USE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

backbone = AutoModel.from_pretrained({folder}).eval()
processor = AutoImageProcessor.from_pretrained({folder}, backend="pil")
output = backbone(**processor(Image.open("picture.jpg"), return_tensors="pt"))
feature = output.last_hidden_state[:, 0]  # [1, {embed_dim}], the CLS token
patches = output.last_hidden_state[:, {prefix}:]  # [1, patches, {embed_dim}]
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
        folder: an empty folder to fill, under its final name.
        backbone: any network of dino.
        size: side of the images in pixels.
        about: JSON values for the metadata of the weights.

    Raises:
        UserError: for a ViT whose layer norms have another epsilon than all of timm's.
    """
    network = fixed(backbone, (size, size))
    preprocessing = sized(backbone.preprocessing, size)
    architecture, arguments = network.timm_arguments(size)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": network.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], size, size],
            "crop_pct": _crop_pct(preprocessing),
            "crop_mode": "squash" if preprocessing.squash else "center",
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "first_conv": network.first_layer.removeprefix("network.").removesuffix(".weight"),
            "classifier": None,
        },
    }
    _write_json(folder / "config.json", config)
    tensors = from_dino(network.state_dict(), "timm", network.spec)
    save_tensors(folder / "model.safetensors", tensors, about)
    usage = TIMM_USE.format(folder=json.dumps(folder.name), embed_dim=network.embed_dim)
    notes = () if network.position is None else (_size_note(size),)
    return FormatNotes("a folder for timm", usage, preprocessing, notes, library="timm")


def _size_note(size: int) -> str:
    return f"Made for images of {size} x {size} px: for others export with `--size`."


def _crop_pct(preprocessing: Preprocessing) -> float:
    """The fraction from which timm computes our resize: floor(crop / crop_pct)."""
    fraction = preprocessing.crop / preprocessing.resize
    while math.floor(preprocessing.crop / fraction) < preprocessing.resize:
        fraction = math.nextafter(fraction, 0)
    return fraction


# ------------------------------------------------------------------------------------ transformers
def transformers_folder(
    folder: Path, backbone: Backbone, size: int, about: dict[str, Any]
) -> FormatNotes:
    """Write a ViT or ConvNeXt as transformers does; `AutoModel`, `AutoImageProcessor` open it.

    `AutoModel` adds a pooler to a plain ViT and would draw its weights at random. The file holds
    one that changes nothing (identity, no bias, no activation), so `pooler_output` is the feature.

    The arguments are those of `timm_folder`.

    Raises:
        UserError: for a network that transformers does not have.
    """
    network = fixed(backbone, (size, size))
    preprocessing = sized(backbone.preprocessing, size)
    _write_json(folder / "config.json", network.transformers_config(size))
    # BiT's processor is the plain one: shorter side, central crop, mean and standard deviation.
    side, crop = preprocessing.resize, preprocessing.crop
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": network.channels == 3,
        "do_resize": True,
        "size": dict.fromkeys(
            ["height", "width"] if preprocessing.squash else ["shortest_edge"], side
        ),
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    _write_json(folder / "preprocessor_config.json", processor)
    tensors = from_dino(network.state_dict(), "transformers", network.spec)
    if network.transformers_config(size)["model_type"] == "vit":
        tensors["pooler.dense.weight"] = torch.eye(network.embed_dim)
        tensors["pooler.dense.bias"] = torch.zeros(network.embed_dim)
    about = {**about, "spec": network.spec, "preprocessing": preprocessing.to_dict()}
    save_tensors(folder / "model.safetensors", tensors, about)
    usage = TRANSFORMERS_USE.format(
        folder=json.dumps(folder.name),
        embed_dim=network.embed_dim,
        prefix=1 + network.registers,
    )
    title, notes = "a folder for transformers", (_size_note(size),)
    return FormatNotes(title, usage, preprocessing, notes, library="transformers")


# ------------------------------------------------------------------------------------ files
def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors in another library's layout, with metadata.

    transformers needs `format`; `dino_export` holds what tensors do not show (heads, position)
    and the preprocessing for `dino.load`.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:  # also for its permissions: save_file leaves 0600
        save_file(plain, temporary, metadata={"format": "pt", "dino_export": json.dumps(about)})


def is_export(folder: Path) -> bool:
    """Whether a folder can be replaced: it is an export, empty or does not exist."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return not names or (names <= FILES and "README.md" in names)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder of the same name elsewhere; on success it takes the place of `folder`."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as workspace:
        new, former = Path(workspace, folder.name), Path(workspace, f"former {folder.name}")
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
