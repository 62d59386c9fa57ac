"""Runs on shards: the order of visits, and a run that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.packing import pictures, shards
from helpers.small import TINY_RUN
from safetensors.torch import load_file

from dino.data.loader import Batch, PretrainLoader
from dino.data.sources.open import open_source
from dino.data.views.random_streams import WINDOW, epoch_order
from dino.train import loop
from dino.train.loop import train
from dino.train.recipes import demo

CPU = torch.device("cpu")
SETTINGS = {**TINY_RUN, "execution.knn_every": "0 steps", "run.duration": "7 steps"}
COUNT, STEPS = 20, 7  # five steps an epoch


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("packed")
    return shards(folder, pictures(tmp_path_factory.mktemp("pictures"), COUNT), COUNT)


def state(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "LAST").read_text().strip()
    names = ("student", "teacher", "loss", "optimizer")
    return {f"{n}.{k}": v for n in names for k, v in load_file(folder / f"{n}.safetensors").items()}


def test_an_interrupted_run_on_shards_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, order_read = demo().changed(SETTINGS), []

    def batches(self: PretrainLoader) -> Iterator[Batch]:
        for batch in iterate(self):
            order_read.extend(batch.index.tolist())
            yield batch

    iterate = PretrainLoader.__iter__
    monkeypatch.setattr(PretrainLoader, "__iter__", batches)
    train(config, open_source(name), tmp_path / "straight", device=CPU)
    blocks = [1] * COUNT
    assert len(blocks) > WINDOW
    order = [i for epoch in range(2) for i in epoch_order(COUNT, 0, epoch, blocks)]
    assert order_read == order[: 4 * STEPS]

    def stop(self: loop._Loop, step: int) -> None:
        raise InterruptedError

    order_read.clear()
    save = loop._Loop._save
    with monkeypatch.context() as interrupted:
        interrupted.setattr(
            loop._Loop, "_save", lambda self, step: (save(self, step), stop(self, step))
        )
        with pytest.raises(InterruptedError):
            train(config, open_source(name), tmp_path / "resumed", device=CPU)
    train(config, open_source(name), tmp_path / "resumed", device=CPU)
    assert order_read == order[: 4 * STEPS]
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    for key, tensor in straight.items():
        assert torch.equal(tensor, resumed[key]), key
