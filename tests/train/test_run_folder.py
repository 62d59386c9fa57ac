"""A run folder: who may write to it, which run it holds, and what an earlier process left there."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run as run_ranks
from helpers.small import TINY_RUN, images

from dino.data.sources.open import Source, open_source
from dino.data.sources.torch_dataset import TorchDataset
from dino.files import UserError
from dino.runtime import Ranks
from dino.train import run_folder as module
from dino.train.loop import train
from dino.train.recipes import demo
from dino.train.run_folder import NEWER, RunFolder, describe_images

CPU = torch.device("cpu")
VIT_ONLY = ("model.patch_size", "model.position", "model.stem", "model.depth", "model.heads")


def short(out: Path, source: Source | None = None, **changes: Any) -> None:
    settings = {**TINY_RUN, "run.duration": "1 steps", **changes}
    train(demo().changed(settings), source or images(), out, device=CPU)


def folder(tmp_path: Path, names: str = "abcdef") -> Source:
    """A folder of images whose names are given; all have the same content."""
    from PIL import Image

    root = tmp_path / "images"
    root.mkdir()
    for name in names:
        Image.new("RGB", (24, 24)).save(root / f"{name}.png")
    return open_source(root)


# ---------------------------------------------------------------------------------- lock
def hold(path: Path, ready: Any) -> None:
    with RunFolder(path, Ranks()).locked():
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that trains in `tmp_path / "run"`."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(timeout=60)
    yield process
    process.kill()
    process.join(60)


def test_two_processes_do_not_train_in_one_folder(holder: Any, tmp_path: Path) -> None:
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(
        UserError, match=rf"run is in use by another process \(process {holder.pid}"
    ):
        short(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before == {".lock"}
    holder.kill()  # the system releases the lock of a process that dies
    holder.join(60)
    short(tmp_path / "run")


def test_workers_do_not_hold_the_lock(tmp_path: Path) -> None:
    """A killed run's workers may live for some seconds more."""
    if not hasattr(os, "fork"):
        pytest.skip("workers are not forked here")
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    with RunFolder(tmp_path, Ranks()).locked():
        worker.start()
    try:
        other = multiprocessing.get_context("spawn").Process(target=locks, args=(tmp_path,))
        other.start()
        other.join(60)
        assert other.exitcode == 0
    finally:
        worker.kill()
        worker.join(60)


def locks(path: Path) -> None:
    with RunFolder(path, Ranks()).locked() as warnings:
        assert warnings == []


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module, "_lock_exclusively", refuse)
    with RunFolder(tmp_path, Ranks()).locked() as warnings:
        assert "cannot be locked (No locks available)" in warnings[0]


def as_a_rank(ranks: Ranks, path: Path) -> list[str]:
    """The answers to a rank of a folder that is free, and one that cannot be."""

    def lock(folder: Path) -> str:
        with RunFolder(folder, ranks).locked():
            return "locked"

    answers = []
    for action in (
        lambda: lock(path / "new"),
        lambda: lock(path / "file" / "run"),
    ):
        try:
            answers.append(str(action()))
        except UserError as error:
            answers.append(str(error))
    return answers


def test_ranks_share_one_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for free, refused in run_ranks(as_a_rank, 2, tmp_path):
        assert free == "locked"
        assert "run cannot be written (Not a directory)" in refused


# ---------------------------------------------------------------------------------- leftovers
def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    short(tmp_path)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    (tmp_path / ".metrics.jsonl.a1b2.tmp").write_text("{")
    (tmp_path / "checkpoints" / ".LAST.c3.tmp").touch()
    half = tmp_path / "checkpoints" / ".step_00000003.tmp"
    half.mkdir()
    (half / "student.safetensors").touch()
    short(tmp_path)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before


# ---------------------------------------------------------------------------------- which run
MISTAKES: dict[str, dict[str, Any]] = {
    "views": {"views.flip": 1.5},
    "model": {"model.heads": 5},
    "memory": {"head.hidden": 10**9},
    "overflow": {"head.hidden": 10**9, "head.layers": 1000},
    "batch": {"run.batch": 13},
    "schedule": {"optim.warmup": "5 steps"},
    "many views": {"views.local_count": 10**9},
    "architecture": {"model.arch": "resnet50"},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_the_folder_is_touched(tmp_path: Path, mistake: str) -> None:
    with pytest.raises(UserError):
        short(tmp_path / "run", **MISTAKES[mistake])
    assert not (tmp_path / "run").exists()
    short(tmp_path / "run")


def test_views_that_the_network_does_not_take_are_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino.models.vit import ViT

    forward = ViT.forward

    def fixed(self: ViT, images: torch.Tensor, *rest: Any) -> Any:
        if images.shape[-1] == 8:
            raise AssertionError("Input height (8) doesn't match model (16).\nmore")
        return forward(self, images, *rest)

    monkeypatch.setattr(ViT, "forward", fixed)
    words = r"vit_tiny takes no images of 8 px \(Input height \(8\).*\(16\)\.\): change"
    with pytest.raises(UserError, match=words):
        short(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18"])
def test_a_run_of_before_there_were_some_settings_is_resumed(tmp_path: Path, arch: str) -> None:
    changes = {} if arch == "vit_tiny" else {"model.arch": arch, **dict.fromkeys(VIT_ONLY)}
    config = demo().changed({"run.duration": "2 steps", **changes}).for_architecture()
    earlier = config.defining()
    for name in (*NEWER, "model.stem"):
        del earlier[name]
    here = RunFolder(tmp_path, Ranks())
    here.write_config({"defining": earlier, "images": {"digest": "same"}})
    (here.checkpoints / "step_1").mkdir(parents=True)
    (here.checkpoints / "step_1" / "state.json").write_text("{}")
    (here.checkpoints / "LAST").write_text("step_1")
    here.compare(config.defining(), {"digest": "same"})
    other = config.changed({"optim.koleo": 0.5}).defining()
    with pytest.raises(UserError, match=r"optim.koleo is 0.0 there and 0.5 here"):
        here.compare(other, {"digest": "same"})


def test_a_run_that_failed_before_its_first_checkpoint_may_be_changed(tmp_path: Path) -> None:
    floats = TorchDataset([torch.rand(3, 24, 24)] * 12)
    with pytest.raises(UserError, match=r"last because item .* see dino data stats\)$"):
        short(tmp_path / "run", floats)
    short(tmp_path / "run", **{"run.batch": 3})
    with pytest.raises(UserError, match=r"another configuration \(run.batch is 3 there and 4 here"):
        short(tmp_path / "run")


def test_other_images_of_the_same_number_are_refused_by_an_example(tmp_path: Path) -> None:
    source, run = folder(tmp_path), tmp_path / "run"
    short(run, source)
    short(run, open_source(tmp_path / "images"))
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "g.png")
    with pytest.raises(UserError, match=r"others: for example .*c\.png was there, and .*d\.png is"):
        short(run, open_source(tmp_path / "images"))


def test_other_labels_are_refused(tmp_path: Path) -> None:
    items = [images()[index] for index in range(6)]
    short(tmp_path, open_source([(item, 0) for item in items]))
    with pytest.raises(UserError, match=r"the same number, but other names, labels or files"):
        short(tmp_path, open_source([(item, 1) for item in items]))


def test_a_moved_folder_of_images_is_the_same(tmp_path: Path) -> None:
    source = folder(tmp_path)
    before = describe_images(source)["digest"]
    (tmp_path / "images").rename(tmp_path / "moved")
    assert describe_images(open_source(tmp_path / "moved"))["digest"] == before


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{",
        b"{}",
        b'{"defining": []}',
        b'{"defining": {}}',
        b'{"defining": {}, "images": 3}',
        b'{"defining": {}, "images": {}, "init": "x"}',
        b'{"format": 2, "defining": {}}',
        b'{"format": "x", "defining": {}}',
    ],
)
def test_other_content_of_config_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json"):
        short(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_a_list_of_skipped_images_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "skipped.csv").write_text("path,defect\n1,2\n")
    with pytest.raises(UserError, match=r"skipped.csv is damaged"):
        short(tmp_path)


if sys.platform != "win32":

    def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"run cannot be written \(Not a directory\)"):
            short(tmp_path / "file" / "run")
