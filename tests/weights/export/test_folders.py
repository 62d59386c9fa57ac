"""Folders for timm and transformers open there and give the same features of the same picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exporting import TINY, backbone, export, picture, run_card
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as F

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.weights.export.folders import replacing_folder
from dino.weights.load import fingerprint

timm = pytest.importorskip("timm")

# Library, file of the card's picture -> the feature that the card's code computes.
SHAPES: dict[str, dict[str, Any]] = {
    "patch 8": TINY,
    "patch 16, odd grid": {**TINY, "patch_size": 16, "image_size": 48, "heads": 3},
    "mlp": {**TINY, "mlp_ratio": 3.0, "position": "reference"},
}


def assert_features(found: torch.Tensor, made: Backbone, path: Path) -> None:
    expected = made.embed([path])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------ timm
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_timm_gives_the_features_of_a_picture(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, image = backbone(**options), picture(tmp_path / "picture.jpg")
    folder = export(made, tmp_path, "timm", "net")
    monkeypatch.chdir(tmp_path)
    names = run_card(folder / "README.md")
    assert torch.equal(names["image"], made.preprocess(image))
    assert_features(names["feature"], made, tmp_path / "picture.jpg")
    hub = timm.create_model("local-dir:net", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(hub(names["image"][None]), names["feature"])
        tokens = hub.forward_features(names["image"][None])[0, 1:]
        patches = made.features(names["image"][None]).patches[0, 0].flatten(1).T
    torch.testing.assert_close(tokens, patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet50", {"image_size": 32}),
        ("timm:resnet10t", {"image_size": 32, "channels": 2}),
        ("timm:vit_tiny_patch16_224", {"image_size": 32}),
        ("vit_tiny", {**TINY, "channels": 4}),
    ],
)
def test_timm_builds_every_network(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = backbone(arch, **options)
    folder = export(made, tmp_path, "timm", "net")
    config = json.loads((folder / "config.json").read_text())
    loaded = timm.create_model(
        config["architecture"],
        num_classes=0,
        checkpoint_path=str(folder / "model.safetensors"),
        **config["model_args"],
    ).eval()
    images = torch.randn(2, options.get("channels", 3), 32, 32)
    with torch.inference_mode():
        found, expected = loaded(images), made(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    again = dino.load(folder)  # a plain ViT is loaded as ours, under our names
    theirs = {name.removeprefix("network."): t for name, t in again.state_dict().items()}
    ours = {name.removeprefix("network."): t for name, t in made.state_dict().items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    with torch.inference_mode():
        torch.testing.assert_close(
            again(images), found, rtol=0, atol=1e-5 * expected.abs().max().item()
        )


@pytest.mark.parametrize(
    ("resize", "crop", "squash"),
    [
        (73, 64, False),
        (59, 24, False),  # floor(24 / (24 / 59)) is 58, unless the share is rounded down
        (53, 40, True),
    ],
)
def test_timm_resizes_as_we_do(resize: int, crop: int, squash: bool, tmp_path: Path) -> None:
    made, image = backbone(), picture(tmp_path / "picture.jpg", (301, 200))
    made.preprocessing = Preprocessing(resize, crop, interpolation="bilinear", squash=squash)
    folder = export(made, tmp_path, "timm", "net")
    settings = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=settings))
    assert torch.equal(transform(image), made.preprocess(image))


def test_another_norm_epsilon_is_refused_for_timm(tmp_path: Path) -> None:
    made = backbone(**TINY, norm_eps=1e-12)
    with pytest.raises(UserError, match="norm epsilon 1e-06, this one has 1e-12"):
        export(made, tmp_path, "timm", "net")
    assert not (tmp_path / "net").exists()


# ------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize(
    "options", [*SHAPES.values(), {**TINY, "norm_eps": 1e-12}], ids=[*SHAPES, "epsilon"]
)
def test_transformers_gives_the_features_of_a_picture(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    made, image = backbone(**options), picture(tmp_path / "picture.jpg", (64, 48))
    export(made, tmp_path, "transformers", "net")
    monkeypatch.chdir(tmp_path)
    names = run_card(tmp_path / "net" / "README.md")
    pixels = names["processor"](image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, made.preprocess(image), rtol=0, atol=1e-6)
    assert_features(names["feature"], made, tmp_path / "picture.jpg")
    torch.testing.assert_close(names["output"].pooler_output, names["feature"], rtol=0, atol=1e-6)
    with torch.inference_mode():
        patches = made.features(made.preprocess(image)[None]).patches[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(names["patches"], patches, rtol=0, atol=1e-5)


def test_transformers_draws_no_weight_at_random(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = export(backbone(), tmp_path, "transformers", "net")
    _, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["pooler.dense.bias"]  # the check would notice it
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.bias"}


def test_the_crop_of_transformers_lies_one_pixel_beside_in_one_ratio_of_four(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    made = backbone()
    folder = export(made, tmp_path, "transformers", "net")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    resize, crop = made.preprocessing.resize, made.preprocessing.crop
    assert (resize, crop) == (36, 32)
    for extra in range(8):  # sizes that need no resizing, so that only the crop acts
        image = picture(tmp_path / "picture.png", (resize + extra, resize))
        pixels = F.normalize(
            F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True),
            list(made.preprocessing.mean),
            list(made.preprocessing.std),
        )
        left = (resize + extra - crop) // 2
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(theirs, pixels[:, 2:34, left : left + crop], rtol=0, atol=1e-6)
        ours = made.preprocess(image)
        left += (resize + extra - crop) % 4 == 3
        torch.testing.assert_close(ours, pixels[:, 2:34, left : left + crop], rtol=0, atol=1e-6)


def test_transformers_has_vits_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layout for timm:resnet10t: use --format timm or onnx"):
        export(backbone("timm:resnet10t", image_size=32), tmp_path, "transformers", "net")


# ------------------------------------------------------------------------------------ both
def test_another_size_is_resampled_as_the_weights_require(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = backbone(**TINY, position="reference")
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected = made(images)
    folder = export(made, tmp_path, "timm", "t", size=(56,))
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 56, 56]
    with torch.inference_mode():
        found = timm.create_model("local-dir:" + str(folder), pretrained=True).eval()(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    folder = export(made, tmp_path, "transformers", "h", size=(56,))
    with torch.inference_mode():
        found = transformers.AutoModel.from_pretrained(folder).eval()(images).last_hidden_state
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-5)
    again = dino.load(folder)
    assert again.spec["image_size"] == 56
    assert (again.preprocessing.resize, again.preprocessing.crop) == (63, 56)


@pytest.mark.parametrize("format", ["timm", "transformers", "official", "safetensors"])
@pytest.mark.parametrize(
    ("arch", "patch", "side"),
    [("vit_tiny", 8, 3), ("vit_tiny", 16, 5), ("vit_small", 8, 5), ("vit_base", 16, 3)],
)
def test_round_trips_are_exact(
    format: Any, arch: str, patch: int, side: int, tmp_path: Path
) -> None:
    # Depth only repeats the names of a block; one network of each width is enough.
    made = backbone(arch, patch_size=patch, image_size=patch * side, depth=2, position="reference")
    name = {"official": "net.safetensors", "safetensors": "net.safetensors"}.get(format, "net")
    again = dino.load(export(made, tmp_path, format, name))
    assert fingerprint(again) == fingerprint(made)
    assert again.preprocessing == made.preprocessing
    assert again.position == "reference"
    assert again.heads == made.heads
    images = torch.randn(1, 3, patch * side, patch * (side + 1))
    with torch.inference_mode():
        assert torch.equal(again(images), made(images))


# ------------------------------------------------------------------------------------ folders
def interrupted(folder: Path) -> None:
    with replacing_folder(folder) as new:
        (new / "README.md").write_text("half")
        raise KeyboardInterrupt


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    made = backbone()
    folder = export(made, tmp_path, "timm", "net")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # safetensors writes 0600
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        made.norm.bias += 1
    export(made, tmp_path, "timm", "net")
    assert (folder / "model.safetensors").read_bytes() != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no export of dino: choose another --out"):
        export(made, tmp_path, "timm", "net")
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: name a folder"):
        export(made, tmp_path, "timm", "file")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
