"""Weights go through files unchanged, and a wrong file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.weights.load import fingerprint, load, save, untrained_like

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32}


def written(path: Path, arch: str = "vit_tiny", **options: Any) -> Path:
    backbone = dino.create(arch, **(options or TINY))
    backbone.preprocessing = Preprocessing(resize=40, crop=32, mean=(0.1, 0.2, 0.3))
    save(backbone, path, {"recipe": "test"})
    return path


@pytest.mark.parametrize(
    ("arch", "options"), [("vit_tiny", TINY), ("resnet50", {"image_size": 64})]
)
def test_round_trip_is_exact(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    original = dino.create(arch, **options)
    original.preprocessing = Preprocessing(resize=40, crop=32, std=(0.5, 0.5, 0.5))
    save(original, tmp_path / "w.safetensors")
    loaded = dino.load(tmp_path / "w.safetensors")
    assert not loaded.training
    assert loaded.spec == original.spec
    assert loaded.preprocessing == original.preprocessing
    assert fingerprint(loaded) == fingerprint(original)
    images = torch.randn(2, 3, 32, 40)
    assert torch.equal(loaded(images), original.eval()(images))


def test_a_run_folder_is_its_teacher(tmp_path: Path) -> None:
    written(tmp_path / "teacher.safetensors")
    assert fingerprint(load(tmp_path)) == fingerprint(load(tmp_path / "teacher.safetensors"))
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dino"])["about"] == {"recipe": "test"}


def test_a_network_says_what_it_was_loaded_from(tmp_path: Path) -> None:
    path = written(tmp_path / "w.safetensors")
    assert repr(load(path)) == f"<dino vit_tiny/8: {path}, teacher>"
    save(dino.create("vit_tiny", **TINY), path, {"step": 300})
    assert repr(load(path)) == f"<dino vit_tiny/8: {path}, teacher, step 300>"
    assert repr(load(path, channels=2)) == repr(load(path))
    assert repr(untrained_like(load(path))) == "<dino vit_tiny/8: weights from no file>"


def test_the_fingerprint_sees_every_bit_and_name(tmp_path: Path) -> None:
    backbone = load(written(tmp_path / "w.safetensors"))
    before = fingerprint(backbone)
    with torch.no_grad():
        backbone.norm.bias[0] += 1e-7
    assert fingerprint(backbone) != before


def test_untrained_is_the_same_architecture_with_other_weights(tmp_path: Path) -> None:
    backbone = load(written(tmp_path / "w.safetensors"))
    state = torch.random.get_rng_state()
    fresh = untrained_like(backbone, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fresh.spec == backbone.spec
    assert fresh.preprocessing == backbone.preprocessing
    assert fingerprint(fresh) != fingerprint(backbone)
    assert fingerprint(fresh) == fingerprint(untrained_like(backbone, seed=3))


def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = written(tmp_path / "good.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-10])
    (tmp_path / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "missing.safetensors": "no weights at",
        "empty": "holds no teacher.safetensors",
        "text.safetensors": "neither safetensors nor a PyTorch checkpoint",
        "cut.safetensors": "not a complete safetensors file",
        "huge.safetensors": "not a complete safetensors file",
        "other.safetensors": "holds no network that dino knows: its first keys are x",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    good = written(tmp_path / "good.safetensors")
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(good)
    tensors["hat"] = tensors.pop("norm.bias")
    tensors["cls_token"] = torch.zeros(1, 1, 5)
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(
        UserError,
        match=r"missing norm.bias; unexpected hat; other shapes: cls_token is \(1, 1, 5\)",
    ):
        load(tmp_path / "bad.safetensors")


def test_files_whose_specification_says_width_still_load(tmp_path: Path) -> None:
    new = written(tmp_path / "new.safetensors")
    with safe_open(new, "pt") as file:
        metadata = {"dino": file.metadata()["dino"].replace('"embed_dim"', '"width"')}
    assert '"width"' in metadata["dino"]
    save_file(load_file(new), tmp_path / "old.safetensors", metadata)
    old = load(tmp_path / "old.safetensors")
    assert fingerprint(old) == fingerprint(load(new))
    assert old.spec == load(new).spec
