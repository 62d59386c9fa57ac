"""Other content in the small files of a run folder: one sentence, or it does not matter."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.small import TINY_RUN, images

import dino
from dino.files import UserError
from dino.pretraining import _comparison
from dino.show.report.report import report
from dino.train.loop import train
from dino.train.planning.budget import parse, resumed
from dino.train.recipes import demo

CONFIG = demo().changed({
    **TINY_RUN,
    "model.depth": 1,
    "run.duration": "2 steps",
    "execution.checkpoint_every": "1 steps",
})  # fmt: skip
TEXTS = (
    *(b"", b"null", b"[]", b"3", b'"x"', b"{}", b"{", b"\xff\xfe", b"\0" * 50),
    *(b"[" * 100_000, b"1" * 5_000, b'{"step": 1e999}'),
)
VALUES = (None, [], {}, "x", -1, True, 10**30, [[]], {"a": 1})
RESULTS = {"trained": 1.0, "untrained": 1.0, "pixels": 1.0, "k": 1, "bank": 1, "queries": 1}


def retrain(run: Path) -> None:
    train(CONFIG, images(), run, device=torch.device("cpu"))


def budget(run: Path) -> None:
    resumed(run, None)
    resumed(run, parse("2h"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    retrain(folder)
    results = {"checkpoint": "step_00000002", "knn": {**RESULTS, "skipped": 0}}
    results["knn"]["leave_one_out"] = True
    (folder / "results.json").write_text(json.dumps(results))
    state = folder / "checkpoints" / "step_00000002" / "state.json"
    content = json.loads(state.read_text())
    del content["sha256"]  # which would hide what is wrong with the rest
    state.write_text(json.dumps({**content, "format": 1}))
    return folder


READERS: dict[str, Callable[[Path], object]] = {
    "train": retrain,
    "load": dino.load,
    "report": lambda run: report(run, images=False),
    "budget": budget,
    "comparison": _comparison,
}
FILES = {
    "config.json": ("train", "load", "report", "budget"),
    "results.json": ("report", "comparison"),
    "checkpoints/LAST": ("train", "load", "budget"),
    "checkpoints/step_00000002/state.json": ("train", "load"),
    "metrics.jsonl": ("report",),
}


def changes(text: bytes) -> Iterator[bytes]:
    """Other texts, and the JSON with another value at some place."""
    yield from (*TEXTS, text[: len(text) // 2])
    if not text.startswith(b"{\n"):
        return
    content = json.loads(text)
    for name, group in content.items():
        inner = list(group)[:3] if isinstance(group, dict) else []
        for value in VALUES:
            yield json.dumps({**content, name: value}).encode()
        for number, key in enumerate(inner):
            for value in VALUES[number::3]:
                changed = copy.deepcopy(content)
                changed[name][key] = value
                yield json.dumps(changed).encode()


@pytest.mark.parametrize("name", FILES)
def test_other_content_is_one_sentence_or_does_not_matter(
    name: str, run: Path, tmp_path: Path
) -> None:
    text, sentences = (run / name).read_bytes(), []
    copied = tmp_path / "run"
    for number, changed in enumerate(changes(text)):
        for reader in FILES[name]:
            if reader in ("train", "report") and number % 4:  # they take longest
                continue
            if reader == "train" or not copied.exists():
                shutil.rmtree(copied, ignore_errors=True)
                shutil.copytree(run, copied)
            (copied / name).write_bytes(changed)
            try:
                READERS[reader](copied)
            except UserError as error:
                sentences.append(str(error))
            except Exception as error:
                raise AssertionError(f"{reader} of {name}: {changed[:300]!r}") from error
    assert not [sentence for sentence in sentences if "\n" in sentence]
    assert sentences or name not in ("config.json", "checkpoints/LAST")
