"""Networks built by timm, transformers and torchvision give the same features here.

From tensors, and from a JPEG through each library's own preprocessing. The weights are random and
large, so that a wrong table cannot pass: one is planted below.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import dino
from dino.files import UserError
from dino.models.convnet import RESNETS
from dino.weights import key_maps as dialects
from dino.weights.load import read_checkpoint

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def scrambled(module: nn.Module) -> nn.Module:
    """Random weights of a size at which each of them matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            spread = 0.5 if tensor.ndim == 1 else 1.5 * tensor[0].numel() ** -0.5
            tensor.normal_(0, spread, generator=generator)
    return module.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1  # features that differ from each other
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    rough.resize((300, 210), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=90)
    return tmp_path / "photo.jpg"


# ------------------------------------------------------------------------------------ timm
PLAIN_VITS = ("vit_tiny_patch16_224", "vit_small_patch8_224")


def timm_folder(folder: Path, name: str, **arguments: Any) -> tuple[Any, Path]:
    timm = pytest.importorskip("timm")
    network = scrambled(timm.create_model(name, num_classes=0, **arguments))
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv")
    given = {key: network.pretrained_cfg[key] for key in keys if key in network.pretrained_cfg}
    config = {"architecture": name, "model_args": arguments, "pretrained_cfg": given}
    (folder / "config.json").write_text(json.dumps(config))
    return network, folder


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch8_224", {"img_size": 72, "depth": 2}),
        ("xcit_nano_12_p16_224", {}),
        ("resnet50", {}),
        ("resnetaa50", {}),  # the keys and shapes of resnet50
        ("resnet18", {}),
        ("resnet10t", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_wee_patch16_reg1_gap_256", {}),
        ("mobilenetv3_small_050", {"in_chans": 3}),
    ],
)
@torch.inference_mode()
def test_timm(name: str, arguments: dict[str, Any], tmp_path: Path, photo: Path) -> None:
    theirs, folder = timm_folder(tmp_path / "model", name, **arguments)
    ours = dino.load(folder)
    assert ours.origin["dialect"] == "timm"
    assert ours.spec["arch"].startswith("timm:") != (name in (*RESNETS, *PLAIN_VITS))
    size = arguments.get("img_size", theirs.pretrained_cfg["input_size"][1])
    images = torch.randn(2, 3, size, size)
    assert_close(ours(images), theirs(images))
    if "img_size" in arguments:  # their transform is for 224, which this network does not take
        return
    data = pytest.importorskip("timm.data")
    transform = data.create_transform(**data.resolve_data_config({}, model=theirs))
    picture = transform(Image.open(photo))
    assert torch.equal(ours.preprocess(Image.open(photo)), picture)
    assert_close(torch.from_numpy(ours.embed([photo])), theirs(picture[None]))


@pytest.mark.parametrize("name", ["resnetaa50", "resnet34"])
@torch.inference_mode()
def test_a_training_checkpoint_that_names_timms_architecture(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = scrambled(timm.create_model(name, num_classes=0))
    path = tmp_path / "last.pth.tar"
    content = {"arch": name, "state_dict": theirs.state_dict(), "args": argparse.Namespace()}
    torch.save(content, path)
    ours = dino.load(path)
    images = torch.randn(1, 3, 64, 64)
    assert ours.spec == {"arch": f"timm:{name}"}
    assert_close(ours(images), theirs(images))
    torch.save({**content, "args": argparse.Namespace(model=name, gp="max")}, path)
    with pytest.raises(
        UserError, match="arguments of timm that dino does not support: global_pool"
    ):
        dino.load(path)
    del content["arch"]
    torch.save(content, path)
    if name == "resnet34":
        with pytest.raises(
            UserError, match=r'another ResNet: name it in a config.json .*"resnet34"'
        ):
            dino.load(path)
    else:  # nothing in the file tells it from ResNet-50
        assert "resnetaa50" in " ".join(read_checkpoint(path).warnings)


def test_another_activation_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks with the same keys whose features differ in the fourth digit."""
    timm = pytest.importorskip("timm")
    arguments = {"depth": 1, "img_size": 32}
    tanh = partial(nn.GELU, approximate="tanh")
    plain = timm_folder(tmp_path / "model", "vit_tiny_patch16_224", **arguments)[1]
    assert dino.load(plain).spec["arch"] == "vit_small"
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, act_layer=tanh, **k))
    with pytest.raises(UserError, match="dino does not support: depth"):
        dino.load(plain)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "xcit_tiny_12_p8_224"])
@torch.inference_mode()
def test_official_xcit_through_timm(name: str, tmp_path: Path) -> None:
    """A file with the keys of facebookresearch/xcit, in a full checkpoint's wrapping."""
    timm = pytest.importorskip("timm")
    theirs = scrambled(timm.create_model(name, num_classes=0))
    named = {f"network.{key}": tensor for key, tensor in theirs.state_dict().items()}
    official = dialects.from_dino(named, "official", {"arch": f"timm:{name}"})
    assert "pos_embeder.token_projection.weight" in official
    teacher = {f"backbone.{key}": tensor for key, tensor in official.items()}
    torch.save({"teacher": teacher}, tmp_path / "w.pth")
    ours = dino.load(tmp_path / "w.pth")
    assert ours.spec == {"arch": f"timm:{name}"}
    images = torch.randn(1, 3, 64, 96)
    assert_close(ours(images), theirs(images))


# ------------------------------------------------------------------------------------ transformers
def vit_model(folder: Path, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {"intermediate_size": 96, "image_size": 56, "patch_size": 8, **SMALL, **config}
    network = scrambled(transformers.ViTModel(transformers.ViTConfig(**settings)))
    network.save_pretrained(folder)
    return network


def processor(**settings: Any) -> Any:
    """The processor that uses Pillow, as ours does (transformers 5 gave it another name)."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return kind(**settings)


@pytest.mark.parametrize("patch", [8, 16])
@torch.inference_mode()
def test_transformers(patch: int, tmp_path: Path, photo: Path) -> None:
    side = 7 * patch
    sizes = {"image_size": side, "patch_size": patch}
    theirs = vit_model(tmp_path / "model", layer_norm_eps=1e-2, **sizes)
    transform = processor(
        size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    transform.save_pretrained(tmp_path / "model")
    ours = dino.load(tmp_path / "model")
    assert ours.origin["dialect"] == "transformers"
    images = torch.randn(2, 3, side, side)
    assert_close(ours(images), theirs(images).last_hidden_state[:, 0])
    picture = transform(Image.open(photo), return_tensors="pt")["pixel_values"]
    assert_close(ours.preprocess(Image.open(photo))[None], picture)
    assert_close(torch.from_numpy(ours.embed([photo])), theirs(picture).last_hidden_state[:, 0])


@torch.inference_mode()
def test_transformers_at_other_sizes(tmp_path: Path) -> None:
    """`exact` is what transformers computes; the published code's flavour is another."""
    theirs = vit_model(tmp_path / "model")
    images = torch.randn(1, 3, 80, 104)
    found = theirs(images, interpolate_pos_encoding=True).last_hidden_state
    ours = dino.load(tmp_path / "model")
    assert_close(ours(images), found[:, 0])
    assert_close(ours.features(images).patches[0].flatten(2).transpose(1, 2), found[:, 1:])
    reference = dino.load(tmp_path / "model", position="reference")
    assert (reference(images) - found[:, 0]).abs().max() > 1e-4


@torch.inference_mode()
def test_a_transformers_classifier_and_its_module_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(intermediate_size=96, image_size=56, patch_size=8, **SMALL)
    theirs = scrambled(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "model")
    images = torch.randn(2, 3, 56, 56)
    expected = theirs.vit(images).last_hidden_state[:, 0]
    assert_close(dino.load(tmp_path / "model")(images), expected)
    torch.save(theirs.vit.state_dict(), tmp_path / "module.pth")
    assert_close(dino.load(tmp_path / "module.pth", heads=4)(images), expected)


# ------------------------------------------------------------------------------------ torchvision
@torch.inference_mode()
def test_torchvision_with_official_keys(tmp_path: Path, photo: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50()
    theirs.fc = nn.Identity()
    scrambled(theirs)
    torch.save(theirs.state_dict(), tmp_path / "dino_resnet50_pretrain.pth")
    ours = dino.load(tmp_path / "dino_resnet50_pretrain.pth")
    assert ours.origin["dialect"] == "official"
    images = torch.randn(1, 3, 64, 96)
    assert_close(ours(images), theirs(images))
    transforms = torchvision.transforms
    transform = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    picture = transform(Image.open(photo))
    assert torch.equal(ours.preprocess(Image.open(photo)), picture)
    assert_close(torch.from_numpy(ours.embed([photo])), theirs(picture[None]))


# ------------------------------------------------------------------------------------ wrong tables
def swapped(table: dict[Any, Any], one: str, other: str) -> dict[Any, Any]:
    """A table in which the keys that name `one` and `other` go to each other's place."""
    return {
        theirs: ours.replace(one, "?").replace(other, one).replace("?", other)
        for theirs, ours in table.items()
    }


@pytest.mark.parametrize("mistake", ["norms", "query and key", "key and value"])
@torch.inference_mode()
def test_a_wrong_table_is_noticed(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these loads strictly, every shape fits, and the features are wrong."""
    theirs = vit_model(tmp_path / "model")
    images = torch.randn(2, 3, 56, 56)
    expected = theirs(images).last_hidden_state[:, 0]
    table = dialects.TRANSFORMERS
    if mistake == "norms":
        wrong = swapped(table, "norm1", "norm2")
    else:
        order = (1, 0, 2) if mistake == "query and key" else (0, 2, 1)
        wrong = {
            tuple(keys[i] for i in order) if isinstance(keys, tuple) else keys: ours
            for keys, ours in table.items()
        }
    layouts = [
        replace(layout, table=wrong) if layout.dialect == "transformers" else layout
        for layout in dialects.LAYOUTS
    ]
    monkeypatch.setattr(dialects, "LAYOUTS", tuple(layouts))
    with pytest.raises(AssertionError):
        assert_close(dino.load(tmp_path / "model")(images), expected)
