"""A run that starts from weights: what comes from them, what is converted, what is refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import build_timm, official
from helpers.small import TINY_RUN, images
from safetensors.torch import load_file
from torch import Tensor

import dino
from dino import cli
from dino.data.images.preprocessing import Preprocessing
from dino.data.sources.open import open_source
from dino.distillation.step import Distillation
from dino.evaluate.classification.knn import KNNEvaluation
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import Ranks
from dino.train import loop as module
from dino.train.build import build
from dino.train.cli_arguments import given
from dino.train.config import PretrainConfig
from dino.train.loop import train
from dino.train.recipes import demo, small_data
from dino.train.run_log import read_metrics
from dino.train.warm_start import HeadChoice, Initial, begin
from dino.weights.conventions import without_chunks
from dino.weights.export.command import Export
from dino.weights.export.command import run as write_export
from dino.weights.load import save

CPU = torch.device("cpu")
SIZES = ("embed_dim", "depth", "heads", "patch_size", "drop_path")
RUN = {k: v for k, v in TINY_RUN.items() if not k.startswith(("model.", "head."))}
"""Settings of the tests' runs without those of networks, which come from the weights."""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose student, teacher, head and center all differ from the start."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    settings = {**TINY_RUN, "run.duration": "4 steps", "teacher.momentum": 0.7}
    train(demo().changed(settings), images(), folder, device=CPU)
    return folder


def start(
    weights: Path, run: Path, head: HeadChoice = "auto", **settings: Any
) -> tuple[PretrainConfig, Initial]:
    """What `dino pretrain small_data --init-from weights` makes of some given settings."""
    requested = {name.replace("__", "."): value for name, value in settings.items()}
    config = small_data().changed({**RUN, **requested})
    return begin(config, weights, run, given=requested, head=head)


def filled(config: PretrainConfig, initial: Initial) -> Distillation:
    made = build(config, config.schedules(3), CPU, Ranks(), initial)
    initial.fill(made)
    return made


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# --------------------------------------------------------------------- settings and tensors
def test_a_run_folder_gives_student_teacher_head_and_center(earlier: Path, tmp_path: Path) -> None:
    config, initial = start(earlier, tmp_path)
    assert (config.model.embed_dim, config.model.depth, config.model.heads) == (24, 2, 2)
    assert (config.model.patch_size, config.model.position) == (8, "exact")
    assert (config.head.prototypes, config.head.hidden, config.head.bottleneck) == (16, 16, 8)
    assert config.optim.freeze_backbone == "0 epochs"
    made = filled(config, initial)
    last = earlier / "checkpoints" / "step_00000004"
    assert set(made.stored()) == {"student", "teacher", "loss"}
    for name, saved in made.stored().items():
        assert_equal(saved.state_dict(), load_file(last / f"{name}.safetensors"))
    student, teacher = (net.backbone.state_dict() for net in (made.student, made.teacher))
    assert not torch.equal(student["cls_token"], teacher["cls_token"])
    assert made.targets.center.abs().max() > 0
    views = torch.randn(2, 3, 16, 16)
    loaded = dino.load(earlier).requires_grad_(False)  # else PyTorch multiplies in another order
    assert torch.equal(made.teacher.backbone.eval()(views), loaded(views))


def test_a_file_of_one_network_is_student_and_teacher_and_gets_a_new_head(
    earlier: Path, tmp_path: Path
) -> None:
    config, initial = start(earlier / "teacher.safetensors", tmp_path)
    assert config.head == small_data().head
    assert config.optim.freeze_backbone == "1 epochs"
    assert config.schedules(3).backbone_freeze_steps == 3
    made = filled(config, initial)
    for network in (made.student, made.teacher):
        assert_equal(network.backbone.state_dict(), load_file(earlier / "teacher.safetensors"))
    assert_equal(made.student.head.state_dict(), made.teacher.head.state_dict())
    assert made.targets.center.abs().max() == 0
    config, _ = start(earlier, tmp_path, optim__freeze_backbone="2 steps", head="new")
    assert (config.optim.freeze_backbone, config.head.prototypes) == ("2 steps", 4096)


@pytest.mark.parametrize("center", [True, False])
def test_a_published_full_checkpoint(earlier: Path, tmp_path: Path, center: bool) -> None:
    last = earlier / "checkpoints" / "step_00000004"
    student = load_file(last / "student.safetensors")
    teacher = load_file(last / "teacher.safetensors")
    content: dict[str, Any] = {
        "student": {f"module.{name}": tensor for name, tensor in student.items()},
        "teacher": teacher,
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", norm_last_layer=False),
    }
    if center:
        content["dino_loss"] = {"center": torch.arange(16.0)[None]}
    torch.save(content, tmp_path / "full.pth")
    config, initial = start(tmp_path / "full.pth", tmp_path, model__heads=2)
    assert config.model.position == "reference"
    assert config.head.fixed_norm is False  # as in the file's arguments
    made = filled(config, initial)
    assert_equal(made.student.state_dict(), student)
    assert_equal(made.teacher.state_dict(), teacher)
    assert torch.equal(made.targets.center, torch.arange(16.0) * center)
    assert any("no center" in note for note in initial.notes) is not center


def test_pixels_mean_what_the_weights_say_unless_given(earlier: Path, tmp_path: Path) -> None:
    backbone = dino.load(earlier)
    backbone.preprocessing = Preprocessing(
        resize=20, crop=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear"
    )
    save(backbone, tmp_path / "w.safetensors")
    config, initial = start(
        tmp_path / "w.safetensors", tmp_path, views__global_size=32, views__local_size=16
    )
    assert (config.pixels.mean, config.pixels.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert any("pixels.mean (0.1, 0.2, 0.3)" in note for note in initial.notes)
    found = initial.backbone().preprocessing
    assert (found.resize, found.crop, found.interpolation) == (40, 32, "bilinear")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mine, initial = start(tmp_path / "w.safetensors", tmp_path, pixels__mean=(0.4, 0.4, 0.4))
    assert (mine.pixels.mean, mine.pixels.std) == ((0.4, 0.4, 0.4), (0.5, 0.6, 0.7))
    assert initial.backbone().preprocessing.mean == (0.4, 0.4, 0.4)


# ------------------------------------------------------------------------------- what is converted
@pytest.mark.parametrize("position", ["reference", "exact"])
@pytest.mark.parametrize("size", [8, 24, 48])
def test_another_size_computes_what_the_old_network_did(
    earlier: Path, tmp_path: Path, position: Any, size: int
) -> None:
    old = dino.load(earlier, position=position)
    old.spec["position"] = position
    save(old, tmp_path / "w.safetensors")
    made = filled(*start(tmp_path / "w.safetensors", tmp_path, views__global_size=size))
    new = made.teacher.backbone.eval()
    assert new.state_dict()["pos_embed"].shape == (1, 1 + (size // 8) ** 2, 24)
    assert new.position == position
    views = torch.randn(2, 3, size, size)
    torch.testing.assert_close(new(views), old(views), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_are_those_of_a_grey_picture(
    earlier: Path, tmp_path: Path, channels: int
) -> None:
    config, initial = start(earlier, tmp_path, pixels__channels=channels)
    assert len(config.pixels.mean) == len(config.pixels.std) == channels
    config.check()
    made = filled(config, initial)
    grey = torch.randn(2, 1, 16, 16)
    ours, theirs = made.teacher.backbone.eval(), dino.load(earlier)
    torch.testing.assert_close(
        ours(grey.expand(-1, channels, -1, -1)),
        theirs(grey.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )
    again, initial = start(earlier, tmp_path)
    assert initial.spec["channels"] == again.pixels.channels == 3


def test_a_network_of_timm_is_not_resampled(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    old = dino.create("timm:test_vit", image_size=96)
    save(old, tmp_path / "w.safetensors")
    config, initial = start(
        tmp_path / "w.safetensors", tmp_path, views__global_size=32, views__local_size=16
    )
    assert config.model.arch == "timm:test_vit"
    assert (config.model.patch_size, config.model.position, config.model.drop_path) == (
        None,
        None,
        0.0,
    )
    config.check()
    made = filled(config, initial)
    views = torch.randn(2, 3, 32, 32)
    assert torch.equal(made.teacher.backbone.eval()(views), old.eval()(views))
    with pytest.raises(UserError, match=r"timm:test_vit has no position to set"):
        start(tmp_path / "w.safetensors", tmp_path, model__position="exact")


# ------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__patch_size": 16}, r"patch_size 8, not 16: leave out --model.patch-size, or st"),
        ({"model__embed_dim": 48}, r"embed_dim 24, not 48: leave out --model.embed-dim"),
        ({"model__arch": "vit_base"}, r"arch vit_tiny, not vit_base"),
        ({"model__depth": None}, r"depth 2, not 12"),
        ({"head__prototypes": 99}, r"prototypes 16, not 99: .*--head.prototypes.*--init-head new"),
    ],
)
def test_what_contradicts_the_weights_is_refused(
    earlier: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        start(earlier, tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_leave_no_folder(earlier: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(earlier, bad)
    file = bad / "checkpoints" / "step_00000004" / "student.safetensors"
    tensors = load_file(file)
    tensors["backbone.hat"] = tensors.pop("backbone.norm.bias")
    from safetensors.torch import save_file

    save_file(tensors, file)
    content = json.loads(file.with_name("state.json").read_text())
    del content["sha256"]  # the file is another, and not damaged
    file.with_name("state.json").write_text(json.dumps(content))
    config, initial = start(bad, tmp_path / "run")
    with pytest.raises(UserError, match=r"missing norm.bias; unexpected hat"):
        train(config, images(), tmp_path / "run", device=CPU, initial=initial)
    assert not (tmp_path / "run").exists()


def test_the_command_knows_what_was_given(
    earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_data().changed({"run.batch": 7, "pixels.channels": 2})
    words = ["--run.batch=7", "--channels", "2", "--optim.freeze_last-layer", "1 epochs", "--out=x"]
    assert given(words, config) == {
        "run.batch": 7,
        "pixels.channels": 2,
        "optim.freeze_last_layer": "3 epochs",
    }
    words = ["--out", str(tmp_path / "run"), "--init-from", str(earlier), "--model.patch-size=16"]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "small_data", *words])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "patch_size 8, not 16" in line


# ------------------------------------------------------------------------------- entire runs
class Scripted:
    """An evaluation with given results."""

    name = "knn"
    num_queries = num_images = 10_000

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def run(self, backbone: Backbone) -> dict[str, float]:
        return {"k20": self.values.pop(0)}


def test_the_start_is_measured_and_a_fall_reported(
    earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, initial = start(earlier, tmp_path)
    script = [Scripted(50.0, 49.5, 45.0)]
    result = train(config, images(), tmp_path, device=CPU, evaluations=script, initial=initial)
    assert result.measured == {"k20": 45.0}
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["knn"]["k20"]) for line in lines if "knn" in line] == [
        (0, 50.0),
        (4, 49.5),
        (8, 45.0),
    ]
    assert [line for line in lines if "below_start" in line] == [{"step": 8, "below_start": 5.0}]
    said = capsys.readouterr().err
    assert "before the first step: knn k20 50.0" in said
    assert "step 8: 5.0 points below the start (50.0)" in said
    assert "lower --optim.lr" in said
    assert_equal(
        load_file(tmp_path / "best.safetensors"), load_file(earlier / "teacher.safetensors")
    )
    state = json.loads((tmp_path / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert (state["start"], state["best"]) == (50.0, 50.0)


def test_a_run_that_dies_before_its_first_checkpoint_logs_the_start_once(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Any, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(module._Loop, "_save", dies)
        config, initial = start(earlier, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            train(
                config,
                images(),
                tmp_path,
                device=CPU,
                evaluations=[Scripted(50.0)],
                initial=initial,
            )
    config, initial = start(earlier, tmp_path)
    train(
        config,
        images(),
        tmp_path,
        device=CPU,
        evaluations=[Scripted(51.0, 52.0, 53.0)],
        initial=initial,
    )
    knn = [(line["step"], line["knn"]["k20"]) for line in read_metrics(tmp_path) if "knn" in line]
    assert knn == [(0, 51.0), (4, 52.0), (8, 53.0)]


def final(run: Path) -> dict[str, Tensor]:
    folder = run / "checkpoints" / "step_00000008"
    files = ("student", "teacher", "loss", "optimizer")
    return {f"{n}.{k}": v for n in files for k, v in load_file(folder / f"{n}.safetensors").items()}


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], Any]) -> None:
    """`run` with a signal in its step number `step`."""
    views = module._Loop._views

    def interrupt(self: Any, batch: Any) -> list[Tensor]:
        if batch.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return views(self, batch)

    with monkeypatch.context() as changed:
        changed.setattr(module._Loop, "_views", interrupt)
        assert run().step == step


def test_stopped_in_and_after_the_warm_up_and_resumed_without_the_weights(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head warms up for 5 of 8 steps; the run stops at 2 and 6, the weights are gone by 2."""
    weights = tmp_path / "w.safetensors"
    shutil.copy(earlier / "teacher.safetensors", weights)

    def go(run: Path, **changes: Any) -> Any:
        settings = {"optim__freeze_backbone": "5 steps", "optim__freeze_last_layer": "0 steps"}
        config, initial = start(weights, run, **{**settings, **changes})
        return train(config, images(), run, device=CPU, initial=initial)

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    go(straight)
    interrupted(monkeypatch, 2, lambda: go(stopped))
    frozen = load_file(stopped / "checkpoints" / "step_00000002" / "student.safetensors")
    assert_equal(without_prefix(frozen, "backbone."), load_file(weights))
    moments = load_file(stopped / "checkpoints" / "step_00000002" / "optimizer.safetensors")
    assert moments
    assert all(name.startswith("head.") for name in moments)
    weights.unlink()
    interrupted(monkeypatch, 6, lambda: go(stopped))
    with pytest.raises(UserError, match=r"optim.lr is 0.0005 there and 0.1 here"):
        go(stopped, optim__lr=0.1)
    with pytest.raises(UserError, match=r"model.embed_dim is 24 there and 48 here"):
        go(stopped, model__embed_dim=48)
    assert go(stopped).finished
    assert_equal(final(stopped), final(straight))
    moved = without_prefix(without_prefix(final(straight), "student."), "backbone.")
    assert not torch.equal(moved["cls_token"], without_prefix(frozen, "backbone.")["cls_token"])


def test_a_run_remembers_what_it_began_with(earlier: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    shutil.copy(earlier / "teacher.safetensors", weights)
    config, initial = start(weights, tmp_path / "run")
    train(config, images(), tmp_path / "run", device=CPU, initial=initial)
    defining = json.loads((tmp_path / "run" / "config.json").read_text())["defining"]
    assert defining["init.from"] == str(weights)
    assert defining["init.sha256"] == initial.sha256
    config, initial = start(earlier, tmp_path / "run")
    with pytest.raises(UserError, match=r"init.from is '.*w.safetensors' there and '.*run' here"):
        train(config, images(), tmp_path / "run", device=CPU, initial=initial)
    with pytest.raises(UserError, match=r"init.from is '.*w.safetensors' there and None here"):
        train(config, images(), tmp_path / "run", device=CPU)
    weights.write_bytes(b"other")
    _, initial = start(weights, tmp_path / "run")
    assert initial.checkpoint is None


def test_a_rate_for_training_from_scratch_is_warned_of(earlier: Path, tmp_path: Path) -> None:
    _, initial = start(earlier, tmp_path)
    assert any("--optim.lr 5e-05" in note for note in initial.notes)
    _, initial = start(earlier, tmp_path, optim__lr=5e-4)
    assert not any("optim.lr" in note for note in initial.notes)


def test_python_begins_at_the_weights_own_accuracy(earlier: Path, tmp_path: Path) -> None:
    data = [(item, index % 3) for index, item in enumerate(map(images().content, range(12)))]
    settings = {**RUN, "run.duration": "2 steps", "optim.warmup": "0 steps"}
    options: dict[str, Any] = {"data": data, "out": tmp_path, "device": "cpu", "settings": settings}
    result = dino.pretrain("small_data", init_from=earlier, **options)
    assert result.finished
    first = next(line for line in read_metrics(tmp_path) if "knn" in line)
    expected = KNNEvaluation(open_source(data), k=(10, 20)).run(dino.load(earlier))
    assert first == {"step": 0, "knn": expected}
    assert json.loads((tmp_path / "config.json").read_text())["about"]["init.from"] == str(earlier)
    with pytest.raises(UserError, match=r"init.head is 'auto' there and 'new' here"):
        dino.pretrain("small_data", init_from=earlier, init_head="new", **options)


# ------------------------------------------------------------------------------- DINOv2 and DINOv3
@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3 plus", "convnext"])
def test_successors_train_resume_and_go_back(kind: str, tmp_path: Path) -> None:
    """From an official file of random parameters, back into the same names and shapes."""
    official_file = tmp_path / "w.pth"
    tensors = official(kind, build_timm(kind))
    torch.save(tensors, official_file)
    patch = {"convnext": 32, "dinov3 plus": 16}.get(kind, 14)
    sizes = {"views__global_size": 2 * patch, "views__local_size": patch, "model__heads": 2}
    if kind != "dinov2 registers":
        del sizes["model__heads"]

    def run(folder: str, until: int | None = None) -> Path:
        config, initial = start(official_file, tmp_path / folder, **sizes)
        if until is not None:
            with pytest.raises(InterruptedError):
                train(
                    config,
                    images(),
                    tmp_path / folder,
                    device=CPU,
                    initial=initial,
                    evaluations=[_Interrupts(until)],
                )
        else:
            train(config, images(), tmp_path / folder, device=CPU, initial=initial)
        return tmp_path / folder

    whole, halves = run("whole"), run("halves", until=1)
    assert (halves / "checkpoints" / "LAST").exists()
    run("halves")
    names = ("student", "teacher", "loss")
    for name in names:
        found, expected = (
            load_file(folder / "checkpoints" / "step_00000008" / f"{name}.safetensors")
            for folder in (halves, whole)
        )
        assert_equal(found, expected)
    started = dino.load(official_file, **({"heads": 2} if "model__heads" in sizes else {}))
    trained = dino.load(whole)
    changed = [
        n
        for n, t in trained.named_parameters()
        if t.shape == started.get_parameter(n).shape
        and not torch.equal(t, started.get_parameter(n))
    ]
    assert any("ls1.gamma" in name or "layer_scale" in name for name in changed)
    export = Export(weights=str(whole), format="official", out=tmp_path / "back.safetensors")
    write_export(export)
    back = load_file(tmp_path / "back.safetensors")
    left_out = {name for name in tensors if "local_cls_norm" in name}
    assert {without_chunks(name) for name in tensors} - left_out == back.keys()
    for name, tensor in tensors.items():
        if name not in left_out and name != "pos_embed":
            assert back[without_chunks(name)].shape == tensor.shape
    with torch.inference_mode():
        views = torch.randn(2, 3, 2 * patch, 2 * patch)
        assert torch.equal(dino.load(tmp_path / "back.safetensors")(views), trained(views))


class _Interrupts:
    """An evaluation at which the run is stopped, the `call`-th one."""

    name, num_queries, num_images = "knn", 10, 10

    def __init__(self, call: int) -> None:
        self.left = call

    def run(self, backbone: Backbone) -> dict[str, float]:
        if not self.left:
            raise InterruptedError
        self.left -= 1
        return {"k20": 1.0}


def test_positions_are_learned_or_rotary(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"position exact, which cannot become rope: leave out"):
        start(earlier, tmp_path, model__position="rope")
    rotary = dino.create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, position="rope")
    save(rotary, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"position rope, which cannot become exact"):
        start(tmp_path / "w.safetensors", tmp_path, model__position="exact")
    with pytest.raises(UserError, match=r"model.registers None, not 4: leave out --model.registe"):
        start(tmp_path / "w.safetensors", tmp_path, model__registers=4)
    config, initial = start(tmp_path / "w.safetensors", tmp_path)
    assert (config.model.position, config.model.registers) == ("rope", None)
    filled(config, initial)


@pytest.mark.parametrize(
    "parts",
    [
        {"model.registers": 2, "model.layer_scale": 1e-5, "model.mlp": "swiglu"},
        {"model.position": "rope", "model.key_bias": False, "model.registers": 1},
    ],
)
def test_own_pretraining_with_these_parts(parts: dict[str, Any], tmp_path: Path) -> None:
    settings = {**TINY_RUN, "run.duration": "2 steps", **parts}
    train(demo().changed(settings), images(), tmp_path, device=CPU)
    found = dino.load(tmp_path)
    names = {name.removeprefix("model."): value for name, value in parts.items()}
    assert {name: found.spec.get(name) for name in names} == names
    assert found.registers == names["registers"]
