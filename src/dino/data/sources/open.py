"""`open_source` turns what the user calls `--data` into a `Source`.

Labels are never required; where they exist they serve evaluations only.
"""

from __future__ import annotations

import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.arrays import Arrays
from dino.data.sources.base import Source
from dino.data.sources.demo import DemoTiles
from dino.data.sources.folder import Folder, warn_left_out
from dino.data.sources.huggingface import HubImages
from dino.data.sources.lists import FileList, list_settings
from dino.data.sources.pages import SUFFIX, Pages
from dino.data.sources.parquet import ParquetImages, image_column
from dino.data.sources.shards import Shards, expand, shard_settings
from dino.data.sources.torch_dataset import TorchDataset
from dino.data.sources.torchvision_datasets import TorchvisionDataset
from dino.files import UserError

__all__ = ["Folder", "Source", "open_source"]


def open_source(data: Any, pixels: PixelFormat = RGB) -> Source:
    """Open what the user calls `--data`; one sentence on stderr counts files that are not read.

    Args:
        data: one of

            * a folder of images, nested or flat;
            * a text, CSV, TSV or Parquet list of files, with settings (module `lists`);
            * either of them with `?pages=all`, for every page of its stacks (`pages`);
            * a Parquet table of encoded images (`parquet`);
            * tar shards of webdataset, `DIR/train-{000..127}.tar`, as paths or URLs (`shards`);
            * a `.npy` file or an array, [N, H, W], [N, H, W, C] or [N, C, H, W] (`arrays`);
            * `hf:NAME`, of the package `datasets` (`huggingface`);
            * `torchvision:NAME` (`torchvision_datasets`);
            * `demo` (or `demo:train`) and `demo:test`, the photographs of scikit-image;
            * a `Source`;
            * any data set or sequence with a length whose items are PIL images, tensors
              [C, H, W], arrays [H, W] or [H, W, C] (`dino.data.images.decode.open_image`), or
              tuples that start with one of these and go on with a label.

        pixels: channels and range expected of the images: those of the weights, where there are
            any (`backbone.preprocessing.pixels`).

    Raises:
        UserError: if there is nothing to train on, in one sentence that names what was found.
    """
    source: Source
    if isinstance(data, (str, os.PathLike)):
        source = _named(os.fspath(data))
        warn_left_out(str(data), source.left_out)
    elif isinstance(data, np.ndarray):
        source = Arrays(data)
    else:
        source = data if isinstance(data, Source) else TorchDataset(data)
    if isinstance(source, Pages) and pixels.page is not None:
        raise UserError(f"{data} takes all pages: leave out --page {pixels.page}")
    if source.pixels != pixels:
        source = copy(source)  # the user's object must not change
        source.pixels = pixels
    return source


def _named(data: str) -> Source:
    if data.endswith(SUFFIX):
        return Pages(_named(data.removesuffix(SUFFIX)))
    if os.path.isdir(data):  # noqa: PTH112, Path's raises for a name as long as a list of shards
        return Folder(data)
    kind, mark, name = data.partition(":")
    if kind == "demo":
        return DemoTiles(name or "train")
    if mark and kind == "hf":
        return HubImages(name)
    if mark and kind == "torchvision":
        return TorchvisionDataset(name)
    if (listed := list_settings(data)) is not None:
        file, settings = Path(listed[0]), listed[1]
        is_parquet = file.suffix.lower() == ".parquet"
        if is_parquet and (column := image_column(file, settings.get("path"))) is not None:
            return ParquetImages(file, **{**settings, "path": column})
        return FileList(file, **settings)
    if data.lower().endswith(".npy"):
        return Arrays(Path(data))
    if (shards := shard_settings(data)) is not None:
        return Shards(expand(shards[0]), **shards[1])
    return Folder(data)
