"""The arguments of `dino pretrain`: where the images are, where the run goes, and every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from dino.data.views.view_spec import ViewSettings
from dino.settings import Range
from dino.train.config import RENAMED, PixelSettings, PretrainConfig, option


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain on unlabelled images; a run folder that holds a checkpoint is resumed."""

    renamed: ClassVar[dict[str, str]] = RENAMED

    out: str
    """The run folder."""
    data: str = "demo"
    """A folder of images, nested or flat, with or without classes; one with train and val inside
    trains on the first and measures on the second. A list of files (.txt, .csv, .tsv, .parquet;
    LIST?path=COLUMN&label=COLUMN&root=DIR). Tar shards, local or by URL
    (DIR/train-{000..127}.tar?image=EXTENSION&label=EXTENSION). An array of images (.npy).
    hf:NAME?split=SPLIT&image=COLUMN&label=COLUMN&config=NAME, by the package datasets.
    torchvision:NAME?split=SPLIT&root=DIR&download=1. Or demo, the photographs installed with the
    program. Labels serve the k-NN evaluation only."""
    val: str | None = None
    """Images with classes, named as --data is, to measure k-NN on while training."""
    stats: str | None = None
    """What `dino data stats` measured on the images: sets every --pixels.* at once."""
    init_from: str | None = None
    """Weights to start from instead of random ones: a run folder, a file of weights or a
    published name. They decide the architecture, mean and deviation of the pixels, and the head if
    they have one; a new head is warmed up first (--optim.freeze-backbone)."""
    init_head: Literal["auto", "new"] = "auto"
    """auto trains the head of --init-from on if there is one; new trains a new one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the expected time and memory, and write and train nothing."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=PretrainConfig
    )
    """Every setting of the recipe, to be changed one by one."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Show the views that a recipe makes of some images, with the numbers they come from."""

    data: tyro.conf.Positional[str]
    """Images: whatever `dino pretrain --data` takes."""
    out: Path = Path("sheet.png")
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


ALIASES = {"--channels": "--pixels.channels"}


def given(words: Sequence[str], config: PretrainConfig) -> dict[str, Any]:
    """The settings that stand on a command line, by their names, with their values in `config`."""
    flags = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    flags = {ALIASES.get(flag, flag) for flag in flags}
    return {name: value for name, value in config.flat().items() if option(name) in flags}
