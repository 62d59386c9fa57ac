"""Where images come from: anything with a length and images by index.

`open_source` turns what a user names (a folder, a list, shards, an array, a data set) into a
`Source`. Labels are never required; where they exist they serve the k-NN evaluation only.
"""

from __future__ import annotations

import os
from copy import copy
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dino.data.images.decode import Sample
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.arrays import Arrays
from dino.data.sources.base import Images
from dino.data.sources.folder import KINDS, image_names
from dino.data.sources.lists import FileList, split_settings
from dino.data.sources.packed_strings import Files
from dino.data.sources.shards import Shards, expand, split_shards
from dino.data.sources.torch_dataset import Samples
from dino.files import UserError


@runtime_checkable
class Source(Protocol):
    """Images by index.

    Attributes:
        labels: class index of each image, or None where there are no classes.
        classes: name of each class, or None.
    """

    labels: list[int] | None
    classes: list[str] | None

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Image `index` as an RGB `PIL.Image` or a uint8 tensor [C, H, W]."""
        ...

    def path(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...


def open_source(data: Any, pixels: PixelFormat = RGB) -> Source:
    """Open what the user calls `--data`.

    Args:
        data: one of

            * a folder of images, nested or flat;
            * a text, CSV, TSV or Parquet list of files, with settings (`dino.data.sources.lists`);
            * tar shards of webdataset, `DIR/train-{000..127}.tar`, as paths or URLs
              (`dino.data.sources.shards`);
            * a `.npy` file or an array, [N, H, W], [N, H, W, C] or [N, C, H, W]
              (`dino.data.sources.arrays`);
            * `hf:NAME`, of the package `datasets` (`dino.data.sources.huggingface`);
            * `torchvision:NAME` (`dino.data.sources.torchvision_datasets`);
            * `demo` (or `demo:train`) and `demo:test`, the embedded photographs;
            * a `Source`;
            * any data set or sequence with a length whose items are PIL images, tensors
              [C, H, W], arrays [H, W] or [H, W, C] (`dino.data.images.decode.open_image`), or
              tuples that start with one of these and go on with a label.

        pixels: channels and range expected of the images: those of the weights, where there are
            any (`backbone.preprocessing.pixels`). A `Source` of the user's own does as it likes.

    Raises:
        UserError: if there is nothing to train on, in one sentence that says what was found.
    """
    source = _opened(data)
    if isinstance(source, Images) and source.pixels != pixels:
        source = copy(source)  # it may be the user's, who reads it as he did before
        source.pixels = pixels
    return source


def _opened(data: Any) -> Source:
    if isinstance(data, (str, os.PathLike)):
        return _named(os.fspath(data))
    if isinstance(data, np.ndarray):
        return Arrays(data)
    if isinstance(data, Source):
        return data
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Samples(data)
    raise UserError(
        f"cannot take images from a {type(data).__name__}: "
        f"give {KINDS}, or a data set with len() and indexing"
    )


def _named(data: str) -> Source:
    if os.path.isdir(data):  # noqa: PTH112, Path's raises for a name as long as a list of shards
        return Folder(data)
    kind, _, name = data.partition(":")
    if kind == "demo":
        from dino.data.sources.demo import DemoTiles

        return DemoTiles(name or "train")
    if kind == "hf":
        from dino.data.sources.huggingface import HubImages

        return HubImages(name)
    if kind == "torchvision":
        from dino.data.sources.torchvision_datasets import VisionImages

        return VisionImages(name)
    if (listed := split_settings(data)) is not None:
        return FileList(listed[0], **listed[1])
    if data.lower().endswith(".npy"):
        return Arrays(Path(data))
    if (shards := split_shards(data)) is not None:
        return Shards(expand(shards[0]), **shards[1])
    return Folder(data)


# ---------------------------------------------------------------------------------- folders
class Folder(Files):
    """The images below a folder, sorted by their path; hidden files and folders are skipped.

    If every image lies in some sub-folder, and there are at least two of them, the sub-folders of
    the first level are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, empty, or holds no image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        names = image_names(Path(root))
        super().__init__(Path(root), names)
        folders = [name.split("/", 1)[0] if "/" in name else None for name in names]
        classes = sorted({folder for folder in folders if folder is not None})
        labelled = None not in folders and len(classes) > 1
        number = {folder: label for label, folder in enumerate(classes)}
        self.classes = classes if labelled else None
        self.labels = [number[folder] for folder in folders if folder] if labelled else None
