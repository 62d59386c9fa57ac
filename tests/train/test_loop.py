"""A run: its folder, its end, its interruptions, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small import TINY_RUN as TINY
from helpers.small import images
from PIL import Image
from safetensors.torch import load_file

from dino import cli
from dino.distillation.step import Distillation, StepReport
from dino.evaluate.protocol import Evaluation
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.train import loop as module
from dino.train.config import PretrainConfig
from dino.train.loop import train
from dino.train.recipes import demo
from dino.train.run_log import read_metrics

CPU = torch.device("cpu")


def config(**changes: Any) -> PretrainConfig:
    return demo().changed({**TINY, **{k.replace("__", "."): v for k, v in changes.items()}})


def final(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "LAST").read_text().strip()
    files = ("student", "teacher", "loss", "optimizer")
    return {f"{n}.{k}": v for n in files for k, v in load_file(folder / f"{n}.safetensors").items()}


def assert_bitwise(a: Path, b: Path) -> None:
    ours, theirs = final(a), final(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class Rising(Evaluation):
    """An evaluation that only counts."""

    name = "knn"
    num_queries = num_images = 100

    def __init__(self) -> None:
        self.count = 0

    def run(self, backbone: Backbone) -> dict[str, float]:
        self.count += 1
        assert backbone(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
        return {"k10": float(10 * self.count)}


def test_a_run_folder_is_complete(tmp_path: Path) -> None:
    result = train(
        config(), images(), tmp_path, device=CPU, about={"data": "x"}, evaluations=[Rising()]
    )
    assert result.finished
    assert (result.step, result.refused, result.measured) == (8, 0, {"k10": 20.0})
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        ".lock",
        "best.safetensors",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "teacher.safetensors",
    }
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [(line["step"], line["knn"]) for line in lines if "knn" in line] == [
        (4, {"k10": 10.0}),
        (8, {"k10": 20.0}),
    ]
    assert set(lines[0]) >= {
        "epoch",
        "loss",
        "lr",
        "weight_decay",
        "momentum",
        "teacher_temp",
        "teacher_entropy",
        "kl",
        "feature_std",
        "effective_rank",
        "images_per_s",
        "data_wait",
        "refused",
    }
    assert lines[0]["loss"] == pytest.approx(lines[0]["teacher_entropy"] + lines[0]["kl"])
    assert json.loads((tmp_path / "config.json").read_text())["defining"]["run.batch"] == 4
    again = train(config(), images(), tmp_path, device=CPU)
    assert again.finished
    assert len(read_metrics(tmp_path)) == len(lines)


def test_after_each_checkpoint_the_main_rank_is_told(tmp_path: Path) -> None:
    steps = []

    def note(step: int) -> None:
        assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == f"step_{step:08}"
        steps.append(step)

    train(config(), images(), tmp_path, device=CPU, after_checkpoint=note)
    assert steps == [3, 6, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher.kind": "previous_iteration", "teacher.targets": "sinkhorn"},
        {"teacher.kind": "previous_epoch", "optim.loss": "mse", "head.predictor": True},
        {"optim.loss": "contrastive", "teacher.targets": "none", "optim.queue": 50},
    ],
    ids=["demo", "sinkhorn", "mse", "contrastive"],
)
def test_stopped_by_a_signal_and_resumed_equals_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    here = config(**changes)
    train(here, images(), tmp_path / "straight", device=CPU)
    views = module._Loop._views

    def interrupt(self: Any, batch: Any) -> list[torch.Tensor]:
        if batch.step == 3:  # in mid-epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return views(self, batch)

    monkeypatch.setattr(module._Loop, "_views", interrupt)
    stopped = train(here, images(), tmp_path / "stopped", device=CPU)
    assert (stopped.step, stopped.finished) == (4, False)
    monkeypatch.undo()
    resumed = train(here, images(), tmp_path / "stopped", device=CPU)
    assert resumed.finished
    assert_bitwise(tmp_path / "straight", tmp_path / "stopped")
    steps = [
        [line["step"] for line in read_metrics(tmp_path / run)] for run in ("straight", "stopped")
    ]
    assert steps[0] == steps[1]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("step", [3, 8])
def test_killed_after_last_was_replaced_the_newest_teacher_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also that of the last step, after which nothing is trained that would write it again."""
    from dino.train import checkpoint

    train(config(), images(), tmp_path / "straight", device=CPU)
    write = checkpoint.atomic_write

    def killed(path: Path, text: str) -> None:
        write(path, text)
        if text == f"step_{step:08d}\n":
            raise Killed

    monkeypatch.setattr(checkpoint, "atomic_write", killed)
    with pytest.raises(Killed):
        train(config(), images(), tmp_path / "killed", device=CPU)
    monkeypatch.undo()
    assert train(config(), images(), tmp_path / "killed", device=CPU).finished
    assert_bitwise(tmp_path / "straight", tmp_path / "killed")
    files = [tmp_path / run / "teacher.safetensors" for run in ("straight", "killed")]
    ours, theirs = map(load_file, files)
    assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
    before = files[1].read_bytes()
    for content in (None, b"", files[0].read_bytes()[:200]):
        files[1].unlink() if content is None else files[1].write_bytes(content)
        assert train(config(), images(), tmp_path / "killed", device=CPU).finished
        assert files[1].read_bytes() == before


def test_a_resumed_run_takes_as_many_images_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums of other micro-batches have other bits; this needs more memory than there is now."""
    half = config(run__duration="8 steps", execution__checkpoint_every="2 steps")
    views = module._Loop._views

    def interrupt(self: Any, batch: Any) -> list[torch.Tensor]:
        if batch.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return views(self, batch)

    monkeypatch.setattr(module._Loop, "_views", interrupt)
    train(half, images(), tmp_path, device=CPU)
    monkeypatch.undo()
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["micro_batch"] == 4
    found: list[Any] = []
    estimate = module.estimate

    def small(*arguments: Any, **options: Any) -> Any:
        found.append(options["micro_batch"])
        return replace(estimate(*arguments, **options), micro_batch=2)

    for stored in (4, None):  # earlier versions wrote null for all images of a step
        (tmp_path / "config.json").write_text(json.dumps({**content, "micro_batch": stored}))
        monkeypatch.setattr(module, "estimate", small)
        train(half, images(), tmp_path, device=CPU, dry_run=True)
        monkeypatch.undo()
    assert found == [4, 4]
    monkeypatch.setattr(module, "estimate", small)
    train(half, images(), tmp_path, device=CPU)
    assert "2 images at a time instead of 4, so the result is the same up to rounding" in (
        capsys.readouterr().err
    )


def test_an_error_of_the_disk_while_training_goes_on_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written beside the training; its error is raised by the next step."""
    from dino.train import checkpoint

    steps, step = [], Distillation.step

    def counted(self: Distillation, views: Any, number: int, *rest: Any) -> StepReport:
        steps.append(number)
        deadline = time.monotonic() + 60
        while number == 3 and time.monotonic() < deadline:
            if writer and not writer[0].is_alive():
                break
            time.sleep(0.01)
        return step(self, views, number, *rest)

    def full(*_: Any, **__: Any) -> None:
        writer.append(threading.current_thread())
        raise OSError(28, "No space left on device")

    writer: list[threading.Thread] = []
    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(Distillation, "step", counted)
    with pytest.raises(UserError, match=r"No space left on device.*no checkpoint was saved"):
        train(config(run__duration="80 steps"), images(), tmp_path, device=CPU)
    assert writer[0] is not threading.main_thread()
    assert steps[-1] < 5


def folder_of_images(path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(10):
        kind = path / "ab"[index % 2]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            kind / f"{index}.png"
        )
    return path


def command(data: Path, out: Path, **changes: Any) -> list[str]:
    settings = {
        **TINY,
        "run.duration": "60 steps",
        "execution.checkpoint_every": "1 steps",
        "execution.knn_every": "0 steps",
        **changes,
    }
    flags = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    return ["pretrain", "demo", "--data", str(data), "--out", str(out), "--device", "cpu", *flags]


@pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING in place of a string
def test_killed_at_random_moments_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    """SIGKILL ten times at random moments, five of them while a checkpoint is being written."""
    data, out = folder_of_images(tmp_path / "images"), tmp_path / "killed"
    cli.main(command(data, tmp_path / "straight"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dino.pretraining", "dino.cli"])
    moments, checkpoints = random.Random(0), out / "checkpoints"
    halves = 0
    for kill in range(10):
        before = (checkpoints / "LAST").read_text() if kill else None
        process = context.Process(target=cli.main, args=(command(data, out),), daemon=True)
        process.start()
        while process.is_alive():  # until it has gone on from where it was
            if (checkpoints / "LAST").exists() and (checkpoints / "LAST").read_text() != before:
                break
        if kill % 2:  # a checkpoint's folder is hidden until it is complete
            while process.is_alive() and not any(checkpoints.glob(".step_*")):
                pass
        time.sleep(moments.uniform(0, 0.004 if kill % 2 else 0.1))
        process.kill()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        halves += any(checkpoints.glob(".step_*"))
    assert halves > 0
    cli.main(command(data, out))
    assert_bitwise(tmp_path / "straight", out)


def test_another_configuration_is_refused_by_its_differences(tmp_path: Path) -> None:
    train(config(), images(), tmp_path, device=CPU)
    with pytest.raises(UserError, match=r"optim.lr is .* there and 0.5 here.*choose another --out"):
        train(config(optim__lr=0.5), images(), tmp_path, device=CPU)
    with pytest.raises(UserError, match=r"data.images is 12 there and 13 here"):
        train(config(), images(13), tmp_path, device=CPU)
    train(config(execution__log_every="1 steps", execution__keep=9), images(), tmp_path, device=CPU)


def test_batches_that_are_not_finite_are_refused_listed_and_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = module._Loop._views

    def poisoned(self: Any, batch: Any) -> list[torch.Tensor]:
        groups = views(self, batch)
        if batch.step == 1 or batch.step >= 5:
            groups[0][0, 0] = float("nan")
        return groups

    monkeypatch.setattr(module._Loop, "_views", poisoned)
    tame = config(
        execution__max_refused=3, run__duration="30 steps", execution__checkpoint_every="1 steps"
    )
    with pytest.raises(
        UserError, match=r"3 steps in a row were not finite, the last at step 8.*is complete"
    ):
        train(tame, images(), tmp_path, device=CPU)
    lines = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 6, 7, 8]
    assert all(len(line["images"]) == 4 for line in lines)
    monkeypatch.undo()
    assert train(tame, images(), tmp_path, device=CPU).finished


def test_a_full_disk_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino.train import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*no checkpoint was saved"):
        train(config(), images(), tmp_path, device=CPU)


def test_collapse_is_reported_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.CollapseMonitor,
        "update",
        lambda self, *_: setattr(self, "collapse", "uniform") or "flat!",
    )
    train(config(run__duration="2 steps"), images(), tmp_path, device=CPU)
    assert "step 1: flat!" in capsys.readouterr().err
    assert {"step": 1, "collapse": "uniform"} in read_metrics(tmp_path)


def test_kl_is_of_the_cross_entropy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loss has another term."""
    step = Distillation.step

    def with_a_regulariser(self: Distillation, *arguments: Any) -> StepReport:
        report = step(self, *arguments)
        return replace(report, terms={**report.terms, "regulariser": torch.tensor(100.0)})

    monkeypatch.setattr(Distillation, "step", with_a_regulariser)
    train(config(execution__log_every="1 steps"), images(), tmp_path, device=CPU)
    line = next(line for line in read_metrics(tmp_path) if "loss" in line)
    assert line["kl"] == pytest.approx(line["cross_entropy"] - line["teacher_entropy"])
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 100)


@pytest.mark.parametrize(
    ("changes", "option"),
    [({}, "--execution.micro-batch"), ({"head__batch_norm": True}, "--batch")],
)
def test_too_little_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], option: str
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Distillation, "step", full)
    with pytest.raises(UserError, match=f"memory does not suffice: set a smaller {option}"):
        train(config(**changes), images(), tmp_path, device=CPU)


def test_tensorboard_gets_every_scalar(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(execution__tensorboard=True)
    train(settings, images(), tmp_path, device=CPU, evaluations=[Rising()])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "knn/k10"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
