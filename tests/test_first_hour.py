"""Natural mistakes of a first hour: each ends in one sentence, whose advice works when typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino import cli
from dino.weights.published import CATALOGUE

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")

TINY = (
    "--device cpu --model.embed-dim 24 --model.depth 1 --model.heads 2 --model.patch-size 8 "
    "--head.prototypes 16 --head.hidden 16 --head.bottleneck 8 --views.global-size 16 "
    "--views.local-size 8 --views.local-count 1 --execution.workers 0 "
)
STEPS = TINY + "--run.duration '2 steps' --optim.warmup '0 steps' "
RUN = f"pretrain demo photos {STEPS} --batch 4 "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a finished run, and some that are neither."""
    path = tmp_path_factory.mktemp("hour")
    generator = np.random.default_rng(0)
    for folder in ("photos", "empty", "texts"):
        (path / folder).mkdir()
    for index in range(12):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (path / "photos" / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path / "photos" / "ab"[index % 2] / f"{index}.png")
    (path / "texts" / "a.txt").write_text("x"), (path / "notes.md").write_text("x")
    return path


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in `place`, where `runs/old` is finished; pages are not drawn."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("dino.pretraining.report", lambda *_, **__: None)
    monkeypatch.setattr("dino.pretraining._compare", lambda *_, **__: None)
    if not Path("runs/old").exists():
        cli.main(shlex.split(f"{RUN} --out runs/old"))


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(words))
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    *notes, line = error.strip().splitlines()
    assert line.startswith("dino: ")
    assert all(map(is_note, notes))
    return line


def is_note(line: str) -> bool:
    """A line that says what a command takes by itself, before it finds the mistake."""
    return line.startswith(("recipe ", "texts: "))


MISTAKES: list[tuple[str, str, str]] = [
    # Words: a command, a recipe, an option.
    (
        f"pretain demo photos {STEPS} --batch 4 --out NEW",
        "did you mean 'dino pretrain'?",
        f"{RUN} --out NEW",
    ),
    ("knn runs/old photos", "did you mean 'dino evaluate knn'?", "evaluate knn runs/old photos"),
    ("evaluate kn runs/old photos", "'dino evaluate knn'", "evaluate knn runs/old photos"),
    (f"pretrain dmeo photos {STEPS} --out NEW", "did you mean demo?", f"{RUN} --out NEW"),
    (
        f"{RUN} --out NEW --optim.rl 1e-3",
        "no option --optim.rl: did you mean --optim.lr",
        f"{RUN} --out NEW --optim.lr 1e-3",
    ),
    (
        f"{RUN} --out NEW --momentum .99",
        "did you mean --teacher.momentum",
        f"{RUN} --out NEW --teacher.momentum .99",
    ),
    (
        f"pretrain demo photos {STEPS} --out NEW --batchsize 4",
        "no option --batchsize: did you mean --batch or",
        f"{RUN} --out NEW",
    ),
    (f"{RUN} -out NEW", "no option -out: did you mean --out?", f"{RUN} --out NEW"),
    ("report --run runs/old", "--run is called --weights now", "report --weights runs/old"),
    # Values.
    (
        f"{RUN} --out NEW --lr fast",
        "--lr is 'fast': it must be a number from 0 to 1,000",
        f"{RUN} --out NEW --lr 1e-3",
    ),
    (
        f"{RUN} --out NEW --run.batch 4",
        "--batch and --run.batch are one setting: give one of them",
        f"{RUN} --out NEW",
    ),
    (
        f"pretrain demo photos {STEPS} --out NEW --batch 64",
        "12 images, fewer than one batch of 64: set --batch 12 or less",
        f"pretrain demo photos {STEPS} --out NEW --batch 12",
    ),
    (
        f"pretrain demo photos {STEPS} --out NEW --batch 0",
        "run.batch is 0: it must be an integer from 1",
        f"{RUN} --out NEW",
    ),
    (
        f"pretrain small_data photos {TINY} --out NEW --batch 12 --epochs 4",
        "optim.warmup '10 epochs' is too long for run.duration '4 epochs': shorten it, for "
        "example --optim.warmup 10%, or",
        f"pretrain small_data photos {TINY} --out NEW --batch 12 --epochs 4 --optim.warmup 10%",
    ),
    # What is missing: the message holds the entire command.
    (f"pretrain demo photos {STEPS} --batch 4", "pretrain demo needs --out: for example", ""),
    ("features runs/old photos", "features needs --out: for example", ""),
    ("evaluate knn runs/old", "knn needs --data: for example", ""),
    ("export runs/old", "export needs --format and --out: for example", ""),
    ("export runs/old --out w.onnx", "--out w.onnx --format onnx", ""),
    ("export runs/old --format official", "--out exports/official.safetensors", ""),
    ("weights convert runs/old --out w.safetensors", "--out w.safetensors --to safetensors", ""),
    ("weights convert runs/old --to timm", "--to timm --out exports/timm", ""),
    # Folders.
    (f"pretrain demo fotos/ {STEPS} --out NEW", "fotos does not exist", f"{RUN} --out NEW"),
    (
        f"pretrain fotos {STEPS} --out NEW",
        "no images at fotos: did you mean photos?",
        f"{RUN} --out NEW",
    ),
    (f"pretrain demo empty {STEPS} --out NEW", "empty is empty", f"{RUN} --out NEW"),
    (f"pretrain demo texts {STEPS} --out NEW", "texts", f"{RUN} --out NEW"),
    (f"pretrain demo notes.md {STEPS} --out NEW", "notes.md is a file", f"{RUN} --out NEW"),
    (
        f"{RUN} --out photos/run",
        "lies in the folder of images photos",
        f"{RUN} --out PLACE/run",
    ),
    (
        "data preview photos demo --out photos/sheet.png",
        "choose another place, such as PLACE/sheet.png",
        "data preview photos demo --out PLACE/sheet.png",
    ),
    (
        "features runs/old photos --out f.csv",
        "another ending than .npy",
        "features runs/old photos --out f.npy",
    ),
    # Runs.
    (
        f"pretrain small_data photos {STEPS} --batch 4 --out runs/old",
        "runs/old holds a run of the recipe demo with another configuration",
        f"pretrain small_data photos {STEPS} --batch 4 --out NEW",
    ),
    (
        f"pretrain demo photos {TINY} --optim.warmup '0 steps' --batch 4 --out runs/old --epochs 2",
        "train on from its weights, give --init-from runs/old and another --out",
        f"pretrain demo photos {TINY} --optim.warmup '0 steps' --batch 4 --epochs 2 "
        "--init-from runs/old --out NEW",
    ),
    ("evaluate knn runs/odl photos", "no weights at runs/odl", "evaluate knn runs/old photos"),
]


@pytest.mark.parametrize(("typed", "sentence", "corrected"), MISTAKES)
def test_the_advice_works_when_typed(
    typed: str, sentence: str, corrected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = f"runs/new{len([*Path('runs').iterdir()])}"
    typed, sentence, corrected = (
        text.replace("NEW", new).replace("PLACE", str(place))
        for text in (typed, sentence, corrected)
    )
    line = refused(typed, capsys)
    assert sentence in line
    corrected = corrected or line.partition("for example dino ")[2]
    cli.main(shlex.split(corrected))
    assert "next: " in capsys.readouterr().err


def test_a_published_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("features dino_vits61 photos --out f.npy", capsys)
    assert "no weights at dino_vits61: did you mean dino_vits16" in line
    assert "did you mean dino_vitb8 or" in refused("weights fetch dino_vitb_8", capsys)
    assert {"dino_vits16", "dino_vitb8"} <= CATALOGUE.keys()


def test_the_recipe_is_never_chosen_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def pretrain(config: Any, **rest: Any) -> Any:
        seen.append(rest)
        raise KeyboardInterrupt

    monkeypatch.setattr("dino.pretraining.pretrain", pretrain)
    words = {
        "photos/ --epochs 3 --out x": ("small_data", "photos/"),
        "photos/ --init-from W --out x": ("small_data", "photos/"),
        "--out x": ("demo", "demo"),
        "demo --out x": ("demo", "demo"),
        "--out x small_data photos": ("small_data", "photos"),
        "photos boost --out x": ("boost", "photos"),
        "vanilla --data photos --out x": ("vanilla", "photos"),
        "small_data demo --out x": ("small_data", "demo"),
    }
    for line, (recipe, data) in words.items():
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main(["pretrain", *line.split()])
        assert (seen[-1]["recipe_name"], seen[-1]["data"]) == (recipe, data)
        said = f"recipe {recipe}, since none is named" in capsys.readouterr().err
        assert said == (recipe not in line)
