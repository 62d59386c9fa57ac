"""Ranks that would not train the same thing stop before the first step and say what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.ranks import run as run_ranks
from helpers.small import TINY_RUN, images

from dino.data.sources.torch_dataset import TorchDataset
from dino.files import UserError
from dino.pretraining import pretrain
from dino.runtime import Ranks
from dino.train import run_folder
from dino.train.loop import train
from dino.train.recipes import demo

SETTINGS = {**TINY_RUN, "run.duration": "2 steps", "execution.checkpoint_every": "1 steps"}


def others() -> TorchDataset:
    return TorchDataset([torch.full((3, 24, 24), index, dtype=torch.uint8) for index in range(12)])


# What only the second rank has, and what both say.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "other images": ({"source": others()}, "rank 1 has another image of"),
    "more images": ({"source": images(13)}, "rank 1 has another data.images than rank 0 (13, not"),
    "too few images": ({"source": images(3)}, "rank 1: the data set has 3 images, fewer than one"),
    "learning rate": ({"optim.lr": 0.25}, "rank 1 has another optim.lr than rank 0 (0.25, not "),
    "when to save": (
        {"execution.checkpoint_every": "2 steps"},
        "rank 1 has another execution.checkpoint_every than rank 0 ('2 steps', not '1 steps')",
    ),
    "a wrong value": ({"views.flip": 1.5}, "rank 1: views.flip is 1.5: it must be"),
    "folder": ({"out": "elsewhere"}, "elsewhere is not the folder that rank 0 writes to"),
}


def mistaken(ranks: Ranks, folder: Path) -> dict[str, str]:
    found = {}
    run_folder.SEEN_SECONDS = 0.2
    for case, (changes, _) in CASES.items():
        changed = changes if ranks.rank == 1 else {}
        found[case] = attempt(folder / case, **changed)
    found["val"] = pretrained(folder / "val", val=labelled(ranks.rank))
    found["recipe"] = pretrained(folder / "val", recipe="demo" if ranks.main else "laptop")
    # The first rank's folder holds a checkpoint that the second does not see.
    found["first"] = attempt(folder / "run")
    out = {"out": "copy"} if ranks.rank == 1 else {}
    found["checkpoint"] = attempt(folder / "run", **out, **{"execution.max_refused": 2})
    return found


def labelled(shift: int) -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((3, 24, 24), i + shift, dtype=torch.uint8), i % 2) for i in range(12)]


def pretrained(run: Path, recipe: str = "demo", **options: Any) -> str:
    try:
        pretrain(recipe, data=labelled(0), out=run, device="cpu", settings=SETTINGS, **options)
    except UserError as error:
        return str(error)
    return "trained"


def attempt(run: Path, source: Any = None, out: str = "", **changes: Any) -> str:
    try:
        config = demo().changed({**SETTINGS, **changes})
        path = run.with_name(out) if out else run
        result = train(config, source or images(), path, device=torch.device("cpu"))
    except UserError as error:
        return str(error)
    return f"step {result.step}"


def test_what_differs_is_said_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(mistaken, 2, tmp_path, joined=False)
    assert first == second
    for case, (_, sentence) in CASES.items():
        assert sentence in first[case], first[case]
        assert not list((tmp_path / case).glob("[!.]*"))  # nothing but the lock was written
    assert "rank 1 has another image of --val than rank 0" in first["val"]
    assert "rank 1 has another recipe than rank 0 ('laptop', not 'demo')" in first["recipe"]
    assert first["first"] == "step 2"
    assert "copy is not the folder that rank 0 writes to" in first["checkpoint"]
