"""`dino export`: files that load elsewhere, cards of known facts, mistakes in one sentence."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.exporting import TINY, backbone, export, picture, run_card
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet50

import dino
from dino import cli
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.weights.export.command import Export, run
from dino.weights.export.model_card import FormatNotes, card, provenance
from dino.weights.load import fingerprint, save

# tyro hands over its MISSING in place of a string, exporters hand over symbolic sizes.
pytestmark = pytest.mark.usefixtures("unchecked")


class OfficialBlock(nn.Module):
    """The published code's block, its names and no more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Official(nn.Module):
    """The published code's ViT at its native size."""

    def __init__(self, made: Backbone) -> None:
        super().__init__()
        width, patch = made.embed_dim, made.patch_size
        count = 1 + made.grid[0] ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, count, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(OfficialBlock(width, made.heads) for _ in range(made.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


# ------------------------------------------------------------------------------------ files
def test_official_names_fit_the_published_layout(tmp_path: Path) -> None:
    made = backbone()
    tensors = load_file(export(made, tmp_path, "official", "net.safetensors"))
    published = Official(made)
    published.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(published(images), made(images), rtol=0, atol=1e-5)
    made = backbone("resnet50", image_size=32)
    path = export(made, tmp_path, "official", "resnet.safetensors")
    published = resnet50()
    published.fc = nn.Identity()
    published.load_state_dict(load_file(path), strict=True)
    with torch.inference_mode():
        assert torch.equal(published.eval()(images), made(images))
    with pytest.raises(UserError, match="official has no layout for timm"):
        export(backbone("timm:resnet10t", image_size=32), tmp_path, "official", "timm.safetensors")


@pytest.mark.parametrize(
    ("format", "name", "settings"),
    [
        ("safetensors", "net.safetensors", {}),
        ("official", "net.safetensors", {}),
        ("onnx", "net.onnx", {"with_normalization": True, "attention": True}),
        ("exported-program", "net.pt2", {}),
    ],
)
def test_the_code_of_a_card_gives_the_feature_of_a_picture(
    format: Any,
    name: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    made = backbone()
    picture(tmp_path / "picture.jpg")
    export(made, tmp_path, format, name, **settings)
    monkeypatch.chdir(tmp_path)
    names = run_card(tmp_path / f"{name}.MODEL_CARD.md")
    found = names.get("features", names.get("cls"))
    found = names["outputs"]["cls"] if found is None else found
    expected = made.embed([tmp_path / "picture.jpg"])
    assert np.abs(np.asarray(found) - expected).max() < 1e-5 * np.abs(expected).max()


def test_sizes_of_graphs(tmp_path: Path) -> None:
    made = backbone(**TINY, position="reference")
    path = export(made, tmp_path, "exported-program", "net.pt2", size=(24, 48), attention=True)
    extra = {"dino.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    images = torch.randn(1, 3, 24, 48)
    with torch.inference_mode():
        found, expected = loaded(images), made.features(images, attention=True)
    for name in ("cls", "patches"):
        torch.testing.assert_close(found[name], getattr(expected, name)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["attention"], expected.attention, rtol=0, atol=1e-5)
    about = json.loads(extra["dino.json"])
    assert about["input"] == {"channels": 3, "height": 24, "width": 48, "pixels": "normalised"}
    assert about["sha256"] == fingerprint(made)
    assert about["spec"] == made.spec


def test_an_export_of_an_export_retains_its_history(tmp_path: Path) -> None:
    made = backbone()
    export(made, tmp_path, "timm", "net")
    run(Export(weights=str(tmp_path / "net"), format="safetensors", out=tmp_path / "b.safetensors"))
    assert fingerprint(dino.load(tmp_path / "b.safetensors")) == fingerprint(made)
    text = (tmp_path / "b.safetensors.MODEL_CARD.md").read_text()
    assert "* recipe: `test`" in text


# ------------------------------------------------------------------------------------ cards
def measured(path: Path, sha256: str, top1: float) -> None:
    score = {"top1": top1, "top5": 90.0}
    content = {
        "knn": {"trained": {"k20": score}},
        "bank": 1200,
        "leave_one_out": True,
        "weights": {"sha256": sha256},
        "settings": {"data": "/home/someone/scans/labelled", "k": [20]},
        "versions": {"torch": "2"},
    }
    path.write_text(json.dumps(content))


def run_folder(folder: Path) -> Backbone:
    """A run of nine steps with what training and evaluations leave in its folder."""
    made = backbone()
    about = {"recipe": "small_data", "data": "/home/someone/scans/train"}
    progress = {"step": 9, "steps": 9, "measured": {"k20": 61.5}}
    save(made, folder / "teacher.safetensors", {**about, **progress})
    config = {"about": about, "defining": {"optim.lr": 5e-4, "data.images": 12345}}
    (folder / "config.json").write_text(json.dumps(config))
    results = {"checkpoint": "step_00000009", "knn": {"trained": 62.25, "pixels": 30.0}}
    (folder / "results.json").write_text(json.dumps(results))
    measured(folder / "knn.json", fingerprint(made), 63.125)
    measured(folder / "other.json", "0" * 64, 99.75)
    (folder / "results").mkdir()
    measured(folder / "results" / "knn-cats.json", fingerprint(made), 51.5)
    return made


def test_a_card_states_known_facts(tmp_path: Path) -> None:
    made = run_folder(tmp_path)
    settings = Export(
        weights=str(tmp_path),
        format="timm",
        out=tmp_path / "net",
        data_description="12,345 scans of one hospital, 2019 to 2024.",
        licence="CC-BY-4.0",
    )
    text = run(settings)[1].read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\nlibrary_name: timm\n")
    for fact in (
        "pipeline_tag: image-feature-extraction",
        "12,345 scans of one hospital, 2019 to 2024.",
        "* recipe: `small_data`",
        "* data: `scans/train`",
        "* step: `9 of 9`",
        "| `during training` | `k-NN top-1 %, k20` | `61.5` |",
        "| `results.json` | `knn trained` | `62.25` |",
        "| `knn.json` | `knn trained k20 top1` | `63.12` |",
        "| `knn.json` | `measured on` | `scans/labelled` |",
        "| `knn-cats.json` | `knn trained k20 top1` | `51.5` |",
        "resize the shorter side to 36 px (bicubic, antialiased)",
        "(0.1, 0.2, 0.3)",
        "CC-BY-4.0.",
        fingerprint(made),
    ):
        assert fact in text, fact
    assert "99.75" not in text  # of other weights
    assert text.count("* step: ") == 1
    assert "/home/someone" not in text
    assert b"/home/someone" not in (tmp_path / "net" / "model.safetensors").read_bytes()
    assert run(settings)[1].read_text() == text


def test_a_card_states_missing_facts(tmp_path: Path) -> None:
    save(backbone(), tmp_path / "w.safetensors")
    settings = {"weights": str(tmp_path / "w.safetensors"), "out": tmp_path / "net"}
    text = run(Export(format="timm", **settings))[1].read_text()
    assert text.startswith("---\nlicense: unknown\n")
    for fact in (
        "No description of the training images was given.",
        "No measurement of these weights was found beside them.",
        "Not stated.",
    ):
        assert fact in text
    text = run(Export(format="timm", licence="Ours: ask", **settings))[1].read_text()
    assert text.startswith('---\nlicense: other\nlicense_name: "Ours: ask"\n')


def test_results_of_another_step_or_run_are_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path)
    results = {"checkpoint": "step_00000005", "knn": {"trained": 11.5}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "broken.json").write_text("{")
    settings = {
        "weights": str(tmp_path),
        "format": "safetensors",
        "out": tmp_path / "a.safetensors",
    }
    assert "11.5" not in run(Export(**settings))[1].read_text()
    results["checkpoint"] = "step_00000009"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "11.5" in run(Export(**settings))[1].read_text()
    config = {"about": {"recipe": "vit_s16"}, "defining": {"optim.lr": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "11.5" not in run(Export(**settings))[1].read_text()


def test_texts_from_files_are_inline_code(tmp_path: Path) -> None:
    """Names, recipes and results are inline code: no HTML, links or further rows."""
    made = backbone()
    hostile = "<img src=x onerror=alert(1)>\n# Title\n|a|b| ![x](http://hostile) ```"
    folder = tmp_path / "a`<b>"
    folder.mkdir()
    save(
        made,
        folder / "w`<i>.safetensors",
        {"recipe": hostile, "data": hostile, "init.from": hostile},
    )
    measured(folder / "knn`|<u>.json", fingerprint(made), 63.125)
    path = folder / "w`<i>.safetensors"
    out = tmp_path / 'n"`<s>'
    text = run(Export(weights=str(path), format="timm", out=out))[1].read_text()
    outside = re.sub(r"```python\n.*?\n```\n", "", text, flags=re.S)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    for mark in ("<", "`", "![", "](", "Title"):
        assert mark not in outside, mark
    rows = [line for line in text.splitlines() if "63.12" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("format", "name", "broken"),
    [
        ("official", "net.safetensors", "command.card"),
        ("official", "net.safetensors", "folders.save_file"),
        ("official", "net.safetensors", "rename"),  # of the file, when its card is in place
        ("timm", "net", "command.card"),
        ("timm", "net", "folders.save_file"),
    ],
)
def test_a_failed_export_can_be_repeated(
    format: Any, name: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, replace = backbone(), Path.replace
    with monkeypatch.context() as patch:
        if broken == "rename":
            fail_at = tmp_path / name
            patch.setattr(
                Path, "replace", lambda self, to: full() if to == fail_at else replace(self, to)
            )
        else:
            patch.setattr(f"dino.weights.export.{broken}", full)
        with pytest.raises(OSError, match="No space"):
            export(made, tmp_path, format, name)
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob("*.tmp"))
    for _ in range(2):  # and what was written is replaced
        assert fingerprint(dino.load(export(made, tmp_path, format, name))) == fingerprint(made)


def test_the_card_of_published_weights_states_their_accuracies() -> None:
    made = backbone()
    source = provenance("dino_vits16", made)
    notes = FormatNotes("a test", "", made.preprocessing, library="timm")
    text = card(made, source, notes)
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "| `published` | `k-NN top-1 %, ImageNet` | `74.5` |" in text
    assert "* weights: `dino_vits16`" in text
    assert card(made, source, notes, licence="mit").startswith("---\nlicense: mit\n")


def test_long_evaluations_are_cut_and_large_files_ignored(tmp_path: Path) -> None:
    made = run_folder(tmp_path)
    numbers = {
        "weights": {"sha256": fingerprint(made)},
        "per_class": {str(n): n for n in range(99)},
    }
    (tmp_path / "classes.json").write_text(json.dumps(numbers))
    (tmp_path / "large.json").write_text(json.dumps({**numbers, "text": "x" * 2**20}))
    rows = [row for row in provenance(tmp_path, made).measures if row[0] == "classes.json"]
    assert len(rows) == 31
    assert rows[-1] == ("classes.json", "more", "69 in the file")
    assert not [row for row in provenance(tmp_path, made).measures if row[0] == "large.json"]


# ------------------------------------------------------------------------------------ command
def test_the_command_ends_with_the_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(backbone(), tmp_path / "w.safetensors")
    out = tmp_path / "net.safetensors"
    words = ["--weights", str(tmp_path / "w.safetensors"), "--format", "official"]
    cli.main(["export", *words, "--out", str(out), "--licence", "mit"])
    assert capsys.readouterr().out.split() == [str(out), f"{out}.MODEL_CARD.md"]
    assert "mit." in Path(f"{out}.MODEL_CARD.md").read_text()
    (tmp_path / "precious.safetensors").write_text("mine")
    for arguments, words_of_error in {
        ("--format", "onnx", "--out", "net"): "writes a file: give --out net.onnx",
        ("--format", "timm", "--out", "net.safetensors"): "writes a folder",
        ("--format", "timm", "--out", "net", "--attention"): "--attention is for onnx and",
        ("--format", "official", "--out", "n.safetensors", "--with-normalization"): "is for onnx",
        ("--format", "official", "--out", "n.safetensors", "--size", "9"): "takes no --size",
        ("--format", "timm", "--out", "net", "--size", "8", "9"): "takes --size with one number",
        ("--format", "onnx", "--out", "n.onnx", "--size", "0"): "must be positive",
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(["export", "--weights", str(tmp_path / "w.safetensors"), *arguments])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words_of_error in line
    with pytest.raises(UserError, match="exists and has no model card"):
        export(backbone(), tmp_path, "safetensors", "precious.safetensors")
    assert (tmp_path / "precious.safetensors").read_text() == "mine"
