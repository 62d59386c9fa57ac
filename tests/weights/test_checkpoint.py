"""Checkpoints with student, teacher, heads and center, whoever wrote them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.evaluate.classification import linear_classifier
from dino.files import UserError
from dino.models.head import Head
from dino.train.loop import train
from dino.train.recipes import demo
from dino.weights.adapt import inflate
from dino.weights.infer_spec import head_of
from dino.weights.key_maps import from_dino
from dino.weights.load import (
    fingerprint,
    load,
    load_strictly,
    mismatches,
    read_checkpoint,
    read_linear,
    save,
)

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 24}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def network(seed: int, **head: Any) -> dict[str, Tensor]:
    """Backbone and head under the published code's names in a full checkpoint."""
    torch.manual_seed(seed)
    backbone = dino.create("vit_tiny", **TINY).state_dict()
    made = Head(24, 16, hidden=20, bottleneck=8, **head).state_dict()
    return {**prefixed("backbone.", backbone), **prefixed("head.", made)}


def full(path: Path, **head: Any) -> dict[str, Any]:
    """A checkpoint as main_dino.py writes it."""
    content = {
        "student": prefixed("module.", network(1, **head)),
        "teacher": network(2, **head),
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", norm_last_layer=False, output_dir=Path("/x")),
        "dino_loss": {"center": torch.randn(1, 16)},
        "fp16_scaler": None,
    }
    torch.save(content, path)
    return content


# ------------------------------------------------------------------------------------ official
def test_a_full_checkpoint(tmp_path: Path) -> None:
    content = full(tmp_path / "checkpoint.pth")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth", heads=2)
    assert checkpoint.dialect == "official"
    assert checkpoint.spec["arch"] == "vit_small"
    assert checkpoint.spec["position"] == "reference"
    assert checkpoint.preprocessing == Preprocessing.for_size(24)
    assert checkpoint.center is not None
    assert torch.equal(checkpoint.center, content["dino_loss"]["center"][0])
    shown = {"prototypes": 16, "hidden": 20, "bottleneck": 8, "layers": 3, "batch_norm": False}
    assert checkpoint.head_options == {**shown, "fixed_norm": False}
    for which, prefix in (("student", "module."), ("teacher", "")):
        state = checkpoint.network(which)  # type: ignore[arg-type]
        assert state.head is not None
        head = Head(24, **checkpoint.head_options)
        load_strictly(head, state.head.tensors, checkpoint.path)
        for name, tensor in state.head.tensors.items():
            assert torch.equal(tensor, content[which][f"{prefix}head.{name}"])
        backbone = load(tmp_path / "checkpoint.pth", network=which, heads=2)  # type: ignore[arg-type]
        assert backbone.origin is not None
        assert backbone.origin["network"] == which
        words = {"student": "student, official weights", "teacher": "official weights"}[which]
        assert repr(backbone) == f"<dino vit_small/8: {tmp_path / 'checkpoint.pth'}, {words}>"
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, content[which][f"{prefix}backbone.{name}"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: prefixed("module.", t),
        lambda t: prefixed("backbone.", t),
        lambda t: prefixed("module.backbone.", t),
        lambda t: prefixed("_orig_mod.", t),
        lambda t: {"state_dict": t},
        lambda t: {"model": prefixed("module.", t), "epoch": 3},
        lambda t: {"teacher": prefixed("backbone.", t)},
        lambda t: {**t, "head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)},
    ],
)
def test_prefixes_and_wrappers(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    original = dino.create("vit_tiny", **TINY)
    torch.save(wrap(original.state_dict()), tmp_path / "w.pth")
    assert fingerprint(load(tmp_path / "w.pth", heads=2)) == fingerprint(original)


def test_a_prefix_in_the_middle_is_a_name(tmp_path: Path) -> None:
    """The published loader removes `module.` wherever it stands, and then loads nothing."""
    tensors = dino.create("vit_tiny", **TINY).state_dict()
    tensors["blocks.0.module.norm1.weight"] = tensors.pop("blocks.0.norm1.weight")
    torch.save(tensors, tmp_path / "w.pth")
    words = "missing blocks.0.norm1.weight; unexpected blocks.0.module.norm1.weight"
    with pytest.raises(UserError, match=words):
        load(tmp_path / "w.pth", heads=2)


def test_a_network_that_is_not_there(tmp_path: Path) -> None:
    torch.save(dino.create("vit_tiny", **TINY).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds no student, but a teacher \(network=teacher\)"):
        load(tmp_path / "w.pth", network="student", heads=2)
    full(tmp_path / "full.pth")
    content = torch.load(tmp_path / "full.pth", weights_only=False)
    del content["teacher"]
    torch.save(content, tmp_path / "full.pth")
    with pytest.raises(UserError, match=r"holds no teacher, but a student \(network=student\)"):
        load(tmp_path / "full.pth", heads=2)
    assert load(tmp_path / "full.pth", network="student", heads=2).embed_dim == 24


# ------------------------------------------------------------------------------------ heads
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 1},
        {"layers": 2, "batch_norm": True},
        {"bottleneck": None, "layers": 1},
        {"bottleneck": None, "layers": 3, "batch_norm": True},
    ],
)
def test_heads_are_read_from_their_tensors(options: dict[str, Any]) -> None:
    settings = {"hidden": 20, "bottleneck": 8, **options}
    original = Head(24, 16, **settings)
    found = head_of(original.state_dict())
    again = Head(24, **found.options)
    load_strictly(again, found.tensors, Path("head"))
    rows = torch.randn(6, 24)
    assert torch.equal(again.eval()(rows), original.eval()(rows))


def test_heads_under_other_names() -> None:
    original = Head(24, 16, bottleneck=8, layers=1).eval()
    ours = original.state_dict()
    theirs = {
        "mlp.weight": ours["mlp.0.weight"],
        "mlp.bias": ours["mlp.0.bias"],
        "last_layer.parametrizations.weight.original0": ours["last_layer.weight_g"],
        "last_layer.parametrizations.weight.original1": ours["last_layer.weight_v"],
    }
    assert head_of(theirs).tensors.keys() == ours.keys()
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16, bias=False))
    modern = {f"last_layer.{name}": tensor for name, tensor in linear.state_dict().items()}
    found = head_of({"mlp.weight": ours["mlp.0.weight"], "mlp.bias": ours["mlp.0.bias"], **modern})
    load_strictly(original, found.tensors, Path("head"))
    z = original.embed(torch.randn(5, 24))
    assert torch.allclose(original.last_layer(z), linear(z), atol=1e-6)


def test_the_head_of_the_released_resnet50(tmp_path: Path) -> None:
    """Two layers, batch norm, 4096 wide in the original; its last layer has no weight norm."""
    torch.manual_seed(0)
    backbone = dino.create("resnet50")
    theirs = nn.Sequential(nn.Linear(2048, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 8))
    last = nn.Linear(8, 16, bias=False)
    published = from_dino(backbone.state_dict(), "official", backbone.spec)
    tensors = {
        **prefixed("module.backbone.", published),
        **prefixed("module.head.mlp.", theirs.state_dict()),
        "module.head.last_layer.weight": last.weight.detach(),
    }
    torch.save({"student": tensors, "teacher": tensors}, tmp_path / "full.pth")
    checkpoint = read_checkpoint(tmp_path / "full.pth")
    assert checkpoint.center is None
    assert "not weight-normed" in " ".join(checkpoint.notes)
    assert checkpoint.head_options is not None
    assert checkpoint.head_options["layers"] == 2
    assert checkpoint.head_options["batch_norm"]
    state = checkpoint.network("teacher")
    head = Head(2048, 16, hidden=12, bottleneck=8, layers=2, batch_norm=True).eval()
    assert state.head is not None
    load_strictly(head, state.head.tensors, checkpoint.path)
    rows = torch.randn(4, 2048)
    expected = last(nn.functional.normalize(theirs.eval()(rows), dim=1))
    assert torch.allclose(head(rows), expected, atol=1e-6)
    assert fingerprint(load(tmp_path / "full.pth")) == fingerprint(backbone)


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    backbone = dino.create("resnet50")
    published = from_dino(backbone.state_dict(), "official", backbone.spec)
    old = {n: t for n, t in published.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(published)
    torch.save(old, tmp_path / "w.pth")
    assert fingerprint(load(tmp_path / "w.pth")) == fingerprint(backbone)


# ------------------------------------------------------------------------------------ assumptions
def vit_s(folder: Path, **changes: Tensor) -> Path:
    """A ViT of width 384 without anything that states its heads."""
    tensors = dino.create("vit_small", depth=1, patch_size=8, image_size=16).state_dict()
    torch.save({**tensors, **changes}, folder / "w.pth")
    return folder / "w.pth"


def test_assumed_heads_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = vit_s(tmp_path)
    assert load(path).spec["heads"] == 6
    (message,) = [record.getMessage() for record in caplog.records]
    assert "6 attention heads are assumed for embed_dim 384" in message
    assert read_checkpoint(path).notes == read_checkpoint(path).warnings != ()
    caplog.clear()
    assert load(path, heads=12).spec["heads"] == 12
    assert caplog.records == []
    full(tmp_path / "full.pth")
    assert "norm_last_layer" not in str(read_checkpoint(tmp_path / "full.pth", heads=2).warnings)


def test_mocos_position_embedding_leaves_the_heads_open(tmp_path: Path) -> None:
    """MoCo-v3's ViT-S has 12 heads of 32 numbers and a fixed embedding, zero for the CLS token."""
    positions = torch.randn(1, 5, 384)
    positions[:, 0] = 0
    path = vit_s(tmp_path, pos_embed=positions)
    with pytest.raises(UserError, match=r"MoCo-v3's .* 12 attention heads and not 6: .*heads=N"):
        load(path)
    assert load(path, heads=12).spec["heads"] == 12


def test_several_networks_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = [dino.create("vit_tiny", **TINY) for _ in range(2)]
    first, second = (network.state_dict() for network in made)
    for keys in (("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "other")):
        optimizer = {"state": {}, "param_groups": []}
        ema = prefixed("module.", second)
        content = {keys[1]: ema, keys[0]: first, "optimizer": optimizer, "epoch": 3}
        torch.save(content, tmp_path / "w.pth")
        caplog.clear()
        assert fingerprint(load(tmp_path / "w.pth", heads=2)) == fingerprint(made[0])
        (message,) = [record.getMessage() for record in caplog.records]
        assert f"{keys[0]} was read, not {keys[1]} of the same file" in message
        chosen = load(tmp_path / "w.pth", network=keys[1], heads=2)
        assert fingerprint(chosen) == fingerprint(made[1])
        assert chosen.origin is not None
        assert chosen.origin["network"] == keys[1]
        with pytest.raises(UserError, match=f"no network 'average'; it holds {keys[0]}, {keys[1]}"):
            load(tmp_path / "w.pth", network="average", heads=2)
    torch.save({"weights": second, "epoch": 3}, tmp_path / "w.pth")  # one, under another name
    assert fingerprint(load(tmp_path / "w.pth", heads=2)) == fingerprint(made[1])


@torch.inference_mode()
def test_foreign_weights_of_four_channels_read_images(tmp_path: Path) -> None:
    torch.save(dino.create("vit_tiny", channels=4, **TINY).state_dict(), tmp_path / "w.pth")
    assert "images of 4 channels" in " ".join(read_checkpoint(tmp_path / "w.pth", heads=2).warnings)
    network = load(tmp_path / "w.pth", heads=2)
    assert network.preprocessing.mean == (0.485, 0.456, 0.406, 0.485)
    assert network.preprocessing.pixels.channels == 4
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 99, (40, 50, 4), np.uint8))
    assert network.embed([tmp_path / "image.npy"]).shape == (1, 24)


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    tensors = dino.create("vit_tiny", **TINY).state_dict()
    for key in (3, ("a", "b"), "line\nbreak" * 99):
        torch.save({"state_dict": {**tensors, key: torch.zeros(1)}}, tmp_path / "w.pth")
        with pytest.raises(UserError) as caught:
            load(tmp_path / "w.pth", heads=2)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_a_name_of_a_checkpoint_is_no_path(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "LAST").write_text(str(run / "checkpoints"))
    with pytest.raises(UserError, match="which is no checkpoint beside it"):
        read_checkpoint(tmp_path / "run")


# ------------------------------------------------------------------------------------ our own runs
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = demo().changed({**small.TINY_RUN, "run.duration": "4 steps", "head.fixed_norm": False})
    train(config, small.images(), folder, device=torch.device("cpu"), about={"recipe": "test"})
    return folder


def test_our_own_run(run: Path) -> None:
    step = run / "checkpoints" / (run / "checkpoints" / "LAST").read_text().strip()
    for path in (run, step, step / "teacher.safetensors"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.dialect == "dino"
        assert checkpoint.about["recipe"] == "test"
        assert checkpoint.head_options == {
            "prototypes": 16,
            "hidden": 16,
            "bottleneck": 8,
            "layers": 3,
            "batch_norm": False,
            "fixed_norm": False,
            "activation": "gelu",
        }
        assert checkpoint.center is not None
        assert torch.equal(checkpoint.center, load_file(step / "loss.safetensors")["center"])
        for which in ("teacher", "student"):
            state = checkpoint.network(which)  # type: ignore[arg-type]
            there = load_file(step / f"{which}.safetensors")
            assert state.head is not None
            found = {
                **prefixed("backbone.", state.backbone),
                **prefixed("head.", state.head.tensors),
            }
            small.assert_same(found, there)
    teacher, student = load(run), load(run, network="student")
    assert fingerprint(teacher) == fingerprint(load(run / "teacher.safetensors"))
    assert fingerprint(teacher) == fingerprint(load(step))
    assert fingerprint(student) != fingerprint(teacher)
    assert student.spec == teacher.spec
    assert student.preprocessing == teacher.preprocessing
    assert student.origin is not None
    assert student.origin["file"] == "student.safetensors"
    earlier = run / "checkpoints" / "step_00000003"
    assert repr(load(earlier)) == f"<dino vit_tiny/8: {earlier}, teacher, step 3>"
    assert repr(teacher) == f"<dino vit_tiny/8: {run}, teacher, step 4>"
    assert repr(student) == f"<dino vit_tiny/8: {run}, student, step 4>"


def test_a_checkpoint_states_its_step(run: Path) -> None:
    """Also an earlier one, beside whose run the newest teacher lies."""
    newest = load(run).origin
    assert newest is not None
    assert (newest["recipe"], newest["step"], newest["steps"]) == ("test", 4, 4)
    for step in (run / "checkpoints").glob("step_*"):
        origin = load(step).origin
        assert origin is not None
        assert (origin["recipe"], origin["step"]) == ("test", int(step.name.removeprefix("step_")))


def test_an_incomplete_checkpoint_of_a_run(run: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"teacher.safetensors is missing, which names"):
        read_checkpoint(step)
    (tmp_path / "run" / "teacher.safetensors").write_bytes(
        (run / "teacher.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r"no complete checkpoint of a run"):
        read_checkpoint(step)
    checkpoint = read_checkpoint(tmp_path / "run")  # no LAST: the teacher is all there is
    assert checkpoint.student is None
    assert checkpoint.teacher is not None


# ------------------------------------------------------------------------------------ other files
def test_weights_of_other_networks_are_refused(tmp_path: Path) -> None:
    backbone = dino.create("vit_tiny", **TINY)
    tensors = backbone.state_dict()

    def refused(changes: dict[str, Tensor | None], **options: Any) -> str:
        changed = {**tensors, **changes}
        remaining = {name: tensor for name, tensor in changed.items() if tensor is not None}
        torch.save(remaining, tmp_path / "w.pth")
        with pytest.raises(UserError) as caught:
            load(tmp_path / "w.pth", **{"heads": 2, **options})
        return str(caught.value)

    gamma = torch.ones(24)
    assert "missing blocks.0.ls2.gamma, blocks.1.ls1" in refused({"blocks.0.ls1.gamma": gamma})
    assert "unexpected blocks.0.ls2.gamma" in refused({"blocks.0.ls2.gamma": gamma})
    assert "register_tokens is (1, 4, 8), not" in refused({"reg_token": torch.zeros(1, 4, 8)})
    assert "missing norm.bias" in refused({"norm.bias": None})
    assert "lacks patch_embed.proj.weight" in refused({"patch_embed.proj.weight": None})
    assert "no square grid" in refused({"pos_embed": torch.zeros(1, 9, 24)})
    assert "has the shape (10, 24)" in refused({"pos_embed": torch.zeros(10, 24)})
    assert "cls_token is (1, 2, 24), not" in refused({"cls_token": torch.zeros(1, 2, 24)})
    assert "attention heads is unknown (embed_dim 24)" in refused({}, heads=None)
    assert "not a multiple of heads" in refused({}, heads=7)
    assert "has no position embedding" in refused_of_resnet(tmp_path)
    torch.save({"encoder.0.weight": gamma, "decoder.bias": gamma}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"its first keys are decoder.bias, encoder.0.weight"):
        load(tmp_path / "other.pth")


def refused_of_resnet(folder: Path) -> str:
    save(dino.create("resnet50"), folder / "r.safetensors")
    with pytest.raises(UserError) as caught:
        load(folder / "r.safetensors", position="exact")
    return str(caught.value)


def test_misfits_are_all_listed() -> None:
    backbone = dino.create("vit_tiny", **TINY)
    tensors = dict(backbone.state_dict())
    assert mismatches(backbone, tensors) == {}
    for index in range(2):
        tensors[f"hat.{index}"] = tensors.pop(f"blocks.{index}.norm1.weight")
    found = mismatches(backbone, tensors)
    assert found["missing"] == ["blocks.0.norm1.weight", "blocks.1.norm1.weight"]
    assert found["unexpected"] == ["hat.0", "hat.1"]


def test_metadata_of_our_files(tmp_path: Path) -> None:
    tensors = {"cls_token": torch.zeros(1, 1, 4)}
    for text, words in {
        "{": "damaged metadata",
        "{}": "damaged metadata",
        json.dumps({"format": 9, "spec": {}, "preprocessing": {}, "about": {}}): "format 9",
    }.items():
        save_file(tensors, tmp_path / "w.safetensors", {"dino": text})
        with pytest.raises(UserError, match=words):
            load(tmp_path / "w.safetensors")


def test_an_architecture_that_would_not_fit_into_memory(tmp_path: Path) -> None:
    """The file names one; its tensors are compared before anything of that size is made."""
    spec = {"arch": "vit_tiny", **TINY, "image_size": 8_000_000}
    words = {"format": 1, "spec": spec, "preprocessing": Preprocessing().to_dict(), "about": {}}
    tensors = dino.create("vit_tiny", **TINY).state_dict()
    save_file(tensors, tmp_path / "w.safetensors", {"dino": json.dumps(words)})
    with pytest.raises(
        UserError, match=r"pos_embed is \(1, 10, 24\), not \(1, 1000000000001, 24\)"
    ):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("place", ["metadata", "config.json"])
def test_an_architecture_of_a_billion_blocks(place: str, tmp_path: Path) -> None:
    tensors = dino.create("vit_tiny", **TINY).state_dict()
    spec = {"arch": "vit_tiny", "depth": 10**9}
    stated = {"format": 1, "spec": spec, "preprocessing": {}, "about": {}}
    metadata = {"dino": json.dumps(stated)} if place == "metadata" else None
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="too few tensors for 1,000,000,000 blocks"):
        load(tmp_path)


def test_what_an_export_notes_is_heeded(tmp_path: Path) -> None:
    """Heads, position and preprocessing, which the published layout has no place for."""
    original = dino.create("vit_tiny", position="exact", **TINY)
    given = Preprocessing(40, 24, squash=True)
    metadata = {"spec": original.spec, "preprocessing": given.to_dict(), "about": {"step": 3}}
    path = tmp_path / "w.safetensors"
    save_file(original.state_dict(), path, {"dino_export": json.dumps(metadata)})
    found = load(path)
    assert (found.heads, found.position, found.preprocessing) == (2, "exact", given)
    assert read_checkpoint(path).about == {"step": 3}


# ------------------------------------------------------------------------------------ linear
def test_linear_classifiers(tmp_path: Path) -> None:
    weight, bias = torch.randn(5, 7), torch.randn(5)
    official = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 3, "state_dict": official, "best_acc": 0.5}, tmp_path / "official.pth")
    torch.save({"weight": weight, "bias": bias}, tmp_path / "plain.pth")
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "ours.safetensors")
    for name in ("official.pth", "plain.pth", "ours.safetensors"):
        found_weight, found_bias = read_linear(tmp_path / name)
        assert torch.equal(found_weight, weight)
        assert torch.equal(found_bias, bias)
    torch.save({"state_dict": {"weight": weight.half(), "bias": bias.half()}}, tmp_path / "h.pth")
    assert read_linear(tmp_path / "h.pth").weight.dtype == torch.float32
    with pytest.raises(UserError, match="no weights at nowhere"):
        read_linear("nowhere")
    with pytest.raises(UserError, match="holds no network that dino knows"):
        load(tmp_path / "official.pth")
    torch.save({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "odd.pth")
    torch.save(dino.create("vit_tiny", **TINY).state_dict(), tmp_path / "network.pth")
    for name in ("odd.pth", "network.pth"):
        with pytest.raises(UserError, match="is no linear classifier"):
            read_linear(tmp_path / name)


def test_a_published_linear_classifier_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the evaluation reads it, `--classifier dino_vits16_linear`."""
    weight, bias = torch.randn(5, 8), torch.randn(5)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    monkeypatch.setattr("dino.weights.load.fetch", lambda published: tmp_path / "w.pth")
    assert torch.equal(read_linear("dino_vits16_linear").weight, weight)
    found = linear_classifier.load(Path("dino_vits16_linear"), average=False)
    assert torch.equal(found.bias, bias)


# ------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("arch", "channels"),
    [("vit_tiny", 1), ("vit_tiny", 2), ("vit_tiny", 4), ("vit_tiny", 6), ("resnet50", 4)],
)
@torch.inference_mode()
def test_a_grey_picture_in_any_number_of_channels(arch: str, channels: int, tmp_path: Path) -> None:
    options = TINY if arch == "vit_tiny" else {}
    save(dino.create(arch, **options), tmp_path / "w.safetensors")
    grey = torch.randn(2, 1, 24, 32)
    expected = load(tmp_path / "w.safetensors")(grey.expand(-1, 3, -1, -1))
    adapted = load(tmp_path / "w.safetensors", channels=channels)
    assert adapted.spec["channels"] == channels
    assert len(adapted.preprocessing.mean) == len(adapted.preprocessing.std) == channels
    found = adapted(grey.expand(-1, channels, -1, -1))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (
        load(tmp_path / "w.safetensors", channels=3).spec == load(tmp_path / "w.safetensors").spec
    )


def test_inflated_weights() -> None:
    weight = torch.randn(5, 3, 2, 2)
    total = weight.sum(dim=1)
    assert torch.equal(inflate(weight, 1)[:, 0], total)
    for channels in (2, 3, 4, 7):
        assert torch.allclose(inflate(weight, channels).sum(dim=1), total, atol=1e-5)
    six = inflate(weight, 6)
    assert torch.allclose(six[:, :3], weight / 2, atol=1e-6)
    assert torch.equal(six[:, :3], six[:, 3:])


@torch.inference_mode()
def test_positions_can_be_chosen(tmp_path: Path) -> None:
    torch.save(dino.create("vit_tiny", **TINY).state_dict(), tmp_path / "w.pth")
    default = load(tmp_path / "w.pth", heads=2)
    exact = load(tmp_path / "w.pth", heads=2, position="exact")
    assert (default.spec["position"], exact.spec["position"]) == ("reference", "exact")
    native, other = torch.randn(1, 3, 24, 24), torch.randn(1, 3, 40, 40)
    assert torch.equal(default(native), exact(native))
    assert not torch.allclose(default(other), exact(other))
