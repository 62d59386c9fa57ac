"""`dino weights`: what the user types and sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.server import serving

import dino
from dino import cli
from dino.weights.download import cached_path
from dino.weights.load import fingerprint
from dino.weights.published import CATALOGUE

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 24}


def printed_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["weights", *arguments])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["weights", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")


def test_list(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached_path(CATALOGUE["dino_vitb8"])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    out = printed_by(capsys, "list", "--json", str(tmp_path / "list.json"))
    assert "dino_vitb8 *" in out
    assert "80.1" in out
    assert "Apache-2.0" in out
    for published in CATALOGUE.values():
        if published.kind == "backbone":
            assert published.name in out
    (row,) = [line for line in out.splitlines() if " dino_vits16 " in line]
    assert [cell.strip() for cell in row.split("│")[3:6]] == ["21", "74.5", "77.0"]
    assert "NAME_full, NAME_linear, NAME_onnx, NAME_args" in out
    assert "dino_vits16_k4096" in out
    written = json.loads((tmp_path / "list.json").read_text())
    assert len(written["files"]) == len(CATALOGUE)
    assert [file["name"] for file in written["files"] if file["cached"]] == ["dino_vitb8"]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = printed_by(capsys, "list")
    assert "…" not in narrow
    assert "74.5" in narrow
    every = printed_by(capsys, "list", "--all")
    assert all(p.origin.base + p.file in every for p in CATALOGUE.values())


def test_fetch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    published = CATALOGUE["dino_vits16_args"]
    with serving() as (address, files):
        monkeypatch.setenv("DINO_MIRROR", address)
        files.content[f"/{published.file}"] = b"arch: vit_small"
        out = printed_by(capsys, "fetch", published.name)
    assert str(cached_path(published)) in out
    assert "sha256" in out
    assert cached_path(published).read_bytes() == b"arch: vit_small"
    assert "no published 'dino_vits'" in refused(capsys, "fetch", "dino_vits")
    assert "for example dino weights fetch dino_vits16" in refused(capsys, "fetch")


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backbone = dino.create("vit_tiny", **TINY)
    path = tmp_path / "w.pth"
    torch.save({**backbone.state_dict(), "head.bias": torch.zeros(3)}, path)
    out = printed_by(
        capsys, "inspect", str(path), "--heads", "2", "--json", str(tmp_path / "i.json")
    )
    assert "official" in out
    assert "3 x 3 patches" in out
    assert "teacher: every key and shape" in out
    assert "head.bias" in out
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["dialect"] == "official"
    assert found["parameters"] == sum(p.numel() for p in backbone.parameters())
    assert found["preprocessing"]["crop"] == 24
    assert len(found["file_sha256"]) == 64
    tensors = dict(backbone.state_dict())
    for index in range(2):
        tensors[f"hat.{index}"] = tensors.pop(f"blocks.{index}.norm1.weight")
    torch.save(tensors, path)
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["weights", "inspect", str(path), "--heads", "2", "--json", str(tmp_path / "i.json")]
        )
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "do not fit the network: missing blocks.0.norm1.weight" in err
    assert len(json.loads((tmp_path / "i.json").read_text())["fits"]) == 4
    for line in ("missing blocks.0.norm1.weight", "missing blocks.1", "unexpected hat.1"):
        assert f"teacher: {line}" in out
    assert "no weights at nowhere" in refused(capsys, "inspect", "nowhere")


@pytest.mark.parametrize("dialect", ["safetensors", "official", "timm", "transformers"])
def test_convert(dialect: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if dialect == "timm":
        pytest.importorskip("timm")
    original = dino.create("vit_tiny", **TINY)
    teacher = {f"backbone.{name}": tensor for name, tensor in original.state_dict().items()}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    torch.save({"teacher": teacher, "student": student}, tmp_path / "full.pth")
    ending = ".safetensors" if dialect in ("safetensors", "official") else ""
    out = tmp_path / f"converted{ending}"
    words = [str(tmp_path / "full.pth"), "--to", dialect, "--out", str(out), "--heads", "2"]
    printed = printed_by(capsys, "convert", *words, "--position", "exact")
    assert str(out) in printed
    found = dino.load(out)
    assert fingerprint(found) == fingerprint(original)
    assert (found.heads, found.position) == (2, "exact")
    printed_by(capsys, "convert", *words, "--network", "student", "--channels", "4")
    adapted = dino.load(out)
    assert adapted.spec["channels"] == 4
    assert not any(tensor.any() for tensor in adapted.state_dict().values())


def test_a_wrong_destination_is_refused_before_the_weights_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("convert", str(tmp_path / "absent"), "--out", str(tmp_path / "net.pth"))
    assert "writes a file: give --out" in refused(capsys, *words, "--to", "official")
    words = ("convert", str(tmp_path / "absent"), "--out", str(tmp_path / "net.safetensors"))
    assert "writes a folder" in refused(capsys, *words, "--to", "timm")


def test_one_of_several_networks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, ema = (dino.create("vit_tiny", **TINY) for _ in range(2))
    content = {"model": model.state_dict(), "model_ema": ema.state_dict()}
    torch.save(content, tmp_path / "w.pth")
    out = printed_by(capsys, "inspect", str(tmp_path / "w.pth"), "--heads", "2")
    assert "model was read, not model_ema" in out
    words = ["convert", str(tmp_path / "w.pth"), "--network", "model_ema", "--heads", "2"]
    words += ["--to", "safetensors", "--out", str(tmp_path / "ema.safetensors")]
    printed_by(capsys, *words)
    assert fingerprint(dino.load(tmp_path / "ema.safetensors")) == fingerprint(ema)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "inspect" in printed_by(capsys, "--help")
    for command in ("list", "fetch", "inspect", "convert"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["weights", command, "--help"])
        assert caught.value.code == 0
        assert "--help" in capsys.readouterr().out
