"""Every command survives a disk that fails: one sentence, no debris, and the next call works."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small import TINY_RUN
from helpers.videos import write_video
from PIL import Image

import dino
from dino import cli
from dino.files import UserError
from dino.weights.load import save

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")

RUN = {**TINY_RUN, "run.duration": "2 steps", "execution.knn_every": "0 steps"}
FLAGS = [w for k, v in RUN.items() for w in (f"--{k.replace('_', '-')}", str(v))]
VIEWS = "--views.global-size 16 --views.local-size 8 --views.local-count 1"
EVALUATE = "--weights IN/w.safetensors --data IN/data --workers 0 --store IN/store"

COMMANDS = {
    "check": "data check IN/data --workers 0 --out OUT/check.csv",
    "stats": "data stats IN/data --workers 0 --out OUT/stats.json",
    "preview": f"data preview IN/data --images 1 --out OUT/sheet.png {VIEWS}",
    "features": f"features {EVALUATE} --out OUT/f.npy",
    "attention": "attention IN/w.safetensors IN/data --out OUT/attention --size 16 --arrays "
    "--write sheet mean",
    "film": "attention IN/w.safetensors IN/clip.mp4 --out OUT/film --size 16",
    "components": "components IN/w.safetensors IN/data --size 16 --parts 2 --arrays "
    "--save-basis OUT/b.safetensors --out OUT/components",
    "objects": "objects IN/w.safetensors IN/data --size 16 --out OUT/objects",
    "knn": f"evaluate knn {EVALUATE} --confusion --out OUT/knn.json",
    "linear": f"evaluate linear {EVALUATE} --val IN/data --mode cached --epochs 1 --batch 4 "
    "--out OUT/linear.json",
    "logistic": f"evaluate logistic {EVALUATE} --val IN/data --fractions 1 --out OUT/logistic.json",
    "explore": "explore IN/data/class0 --weights IN/w.safetensors --size 16 --device cpu "
    "--out OUT/page.html",
    "index": "search IN/w.safetensors IN/data --index OUT/index --out OUT/found --workers 0 "
    "--store IN/store",
    "list": "weights list --json OUT/list.json",
    "inspect": "weights inspect IN/w.safetensors --json OUT/inspect.json",
    "convert": "weights convert IN/w.safetensors --to safetensors --out OUT/c.safetensors",
    "export": "export --weights IN/w.safetensors --format timm --out OUT/timm",
    "pretrain": "pretrain demo --data IN/data/class0 --device cpu --out OUT/run",
}


def raising(number: int) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return function


@contextmanager
def patched(module: Any, name: str, number: int) -> Iterator[str]:
    """A function of the system fails with an error of this number, which names no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, raising(number))
        yield os.strerror(number)


@contextmanager
def small_files() -> Iterator[str]:
    """No write goes beyond 16 bytes, also where a library writes without Python."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        yield os.strerror(errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FAULTS = {
    "probe": lambda: patched(tempfile, "TemporaryFile", errno.EACCES),
    "open": lambda: patched(Path, "touch", errno.EROFS),
    "write": small_files,
    "flush": lambda: patched(os, "fsync", errno.EIO),
    "rename": lambda: patched(os, "replace", errno.ENOSPC),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes in `data`, a video of them, and weights."""
    root = tmp_path_factory.mktemp("inputs")
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        (root / "data" / f"class{index % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "data" / f"class{index % 3}" / f"{index:02}.png")
    write_video(root / "clip.mp4", [Image.fromarray(pixels) for pixels in noise])
    network = dino.create("vit_tiny", patch_size=8, image_size=16, depth=1)
    save(network, root / "w.safetensors")
    return root


def run(name: str, inputs: Path, out: Path) -> None:
    words = COMMANDS[name].replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/").split()
    cli.main([*words, *(FLAGS if name == "pretrain" else [])])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails(
    name: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dino.pretraining.report", lambda *_, **__: None)  # it takes seconds
    monkeypatch.setattr("dino.show.explorer.server.Served.wait", lambda page: page.stop())
    run(name, inputs, tmp_path)  # also fills the store of features, so that only outputs fail
    expected = files(tmp_path)
    assert expected
    for fault in list(FAULTS.values())[name == "list" :]:  # which has no work to probe before
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught, fault() as reason:
            run(name, inputs, tmp_path)
        assert caught.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        (line,) = (line for line in lines if line.startswith("dino: "))
        assert str(tmp_path) in line
        assert reason in line or name == "pretrain"  # whose checkpoints say it in other words
        left = files(tmp_path)
        assert not [path for path in left if ".tmp" in path], fault
        assert left < expected
    run(name, inputs, tmp_path)  # over what the last fault left
    assert files(tmp_path) == expected


def test_the_functions_of_python_name_the_file(inputs: Path, tmp_path: Path) -> None:
    with patched(Path, "open", errno.EIO), pytest.raises(UserError, match=r"w\.safetensors cannot"):
        dino.load(inputs / "w.safetensors")
    with FAULTS["probe"](), pytest.raises(UserError, match="run cannot be used"):
        dino.pretrain("demo", data=inputs / "data", out=tmp_path / "run", settings=RUN)
    assert not (tmp_path / "run").exists()


def test_an_export_without_its_card_is_removed(inputs: Path, tmp_path: Path) -> None:
    words = f"export --weights {inputs}/w.safetensors --format safetensors --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino.weights.export.command.atomic_write", raising(errno.ENOSPC))
        with pytest.raises(SystemExit):
            cli.main([*words.split(), f"{tmp_path}/e.safetensors"])
    assert files(tmp_path) == set()
    cli.main([*words.split(), f"{tmp_path}/e.safetensors"])
    assert files(tmp_path) == {"e.safetensors", "e.safetensors.MODEL_CARD.md"}
