"""The arguments of `dino pretrain`: where the images are, where the run goes, and every setting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from dino.data.views.view_spec import ViewSettings
from dino.files import UserError
from dino.settings import Range
from dino.train.config import RENAMED, PixelSettings, PretrainConfig, Size, option
from dino.train.recipes import RECIPES, refuse

Folder = Annotated[str, tyro.conf.arg(metavar="PATH")]
OptionalPath = Annotated[str | None, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain on unlabelled images; a run folder that holds a checkpoint is resumed."""

    renamed: ClassVar[dict[str, str]] = RENAMED

    out: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """The run folder; one that holds a checkpoint is resumed."""
    data: Folder = "demo"
    """A folder of images, nested or flat, with or without classes; one with train and val inside
    trains on the first and measures on the second. A list of files (.txt, .csv, .tsv, .parquet;
    LIST?path=COLUMN&label=COLUMN&root=DIR). Tar shards, local or by URL
    (DIR/train-{000..127}.tar?image=EXTENSION&label=EXTENSION). An array of images (.npy).
    hf:NAME?split=SPLIT&image=COLUMN&label=COLUMN&config=NAME, by the package datasets.
    torchvision:NAME?split=SPLIT&root=DIR&download=1. Or demo, the photographs installed with the
    program. Labels serve the k-NN evaluation only."""
    budget: Annotated[str | None, tyro.conf.arg(metavar="TIME")] = None
    """The time that the run may take, such as 2h, 90min or 1h30m; without a recipe and a duration,
    1h. Without a recipe, network and settings are chosen from what is timed on this machine with
    these images; a resumed run keeps them. +2h trains on a run that had a budget."""
    batch: Size | None = None
    """Images a step, over all processes: short for --run.batch."""
    epochs: Size | None = None
    """So many epochs: short for --run.duration 'N epochs'."""
    lr: Annotated[float | None, Range(low=0, high=1000), tyro.conf.arg(metavar="RATE")] = None
    """Peak learning rate for 256 images a batch: short for --optim.lr."""
    val: OptionalPath = None
    """Images with classes, named as --data is, to measure k-NN on while training."""
    stats: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """What `dino data stats` measured on the images: sets every --pixels.* at once."""
    init_from: Annotated[str | None, tyro.conf.arg(metavar="WEIGHTS")] = None
    """Weights to start from instead of random ones: a run folder, a file of weights or a
    published name. They decide the architecture, mean and deviation of the pixels, and the head if
    they have one; a new head is warmed up first (--optim.freeze-backbone)."""
    init_head: Literal["auto", "new"] = "auto"
    """auto trains the head of --init-from on if there is one; new trains a new one."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the expected time and memory, and write and train nothing."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=PretrainConfig
    )
    """Every setting of the recipe, to be changed one by one."""

    def changed(self) -> PretrainConfig:
        """The settings with what `batch`, `epochs` and `lr` say."""
        short: dict[str, Any] = {"run.batch": self.batch, "optim.lr": self.lr}
        short["run.duration"] = None if self.epochs is None else f"{self.epochs} epochs"
        return self.config.changed({name: x for name, x in short.items() if x is not None})


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Show the views that a recipe makes of some images, with the numbers they come from."""

    data: Folder
    """Images: whatever `dino pretrain --data` takes."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.png")] = Path("sheet.png")
    """The picture to write; its ending chooses the format."""
    images: Annotated[int, Range(low=1)] = 4
    """How many images, evenly spread over all."""
    epoch: Annotated[int, Range(low=0)] = 0
    """In which the views would be made, counted from 0."""
    seed: Annotated[int, Range(low=0, below=2**63)] = 0
    """Of the run."""
    stats: Path | None = None
    """What `dino data stats` measured on the images."""
    views: ViewSettings = field(default_factory=ViewSettings)
    pixels: PixelSettings = field(default_factory=PixelSettings)


ALIASES = {
    "--channels": "--pixels.channels",
    "--batch": "--run.batch",
    "--epochs": "--run.duration",
    "--lr": "--optim.lr",
}
"""Short names of settings."""


def given(words: Sequence[str], config: PretrainConfig) -> dict[str, Any]:
    """The settings that stand on a command line, by their names, with their values in `config`.

    Raises:
        UserError: for a setting under two names.
    """
    flags = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for short, full in ALIASES.items():
        if {short, full} <= flags:
            raise UserError(f"{short} and {full} are one setting: give one of them")
    flags = {ALIASES.get(flag, flag) for flag in flags}
    return {name: value for name, value in config.flat().items() if option(name) in flags}


def recipe_and_images(words: Sequence[str], *, alone: bool = True) -> tuple[str | None, list[str]]:
    """The recipe among the positional words of a command, and the other words.

    The order does not matter. `demo` is both: a recipe unless the other word is one. A folder with
    the name of a recipe is written with its path, `./demo`.

    Args:
        words: in the order of the command line.
        alone: whether a single word may be a recipe.

    Raises:
        UserError: for a word that is no recipe where there is none, and names no images.
    """
    named = sorted((word for word in words if word in RECIPES), key="demo".__eq__)
    if named and (alone or len(words) > 1):
        images = [*words]
        images.remove(named[0])
        return named[0], images
    for word in words:
        if not (word == "demo" or re.search(r"[/\\:.*{]", word) or Path(word).exists()):
            here = [path.name for path in Path().iterdir()]
            near = get_close_matches(word, [*RECIPES, *here], n=1, cutoff=0.7)
            if near and near[0] not in RECIPES:
                raise UserError(f"there are no images at {word}: did you mean {near[0]}?")
            refuse(word, f"; no images lie at {word} either")
    return None, [*words]
