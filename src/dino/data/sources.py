"""Where images come from: anything with a length and images by index.

`open_source` turns what a user names (a folder, `demo`, a torch data set, a list) into a `Source`.
Labels are never required; where they exist they serve the k-NN evaluation only.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from dino.data.decode import Sample, as_image
from dino.data.lists import FileList, split_settings
from dino.data.names import Files
from dino.files import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Names of files that count as images, in any case."""


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
        """Image `index` as an RGB `PIL.Image` or a uint8 tensor [3, H, W]."""
        ...

    def path(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...


def open_source(data: Any) -> Source:
    """Open what the user calls `--data`.

    Args:
        data: a folder of images, nested or flat; a text, CSV or Parquet list of files (see
            `dino.data.lists`); `demo` (or `demo:train`) and `demo:test`, the embedded photographs;
            a `Source`; or any data set or sequence with a length whose items are PIL images, uint8
            tensors [C, H, W], uint8 arrays [H, W, C], or tuples that start with one of these and go
            on with a label.

    Raises:
        UserError: if there is nothing to train on, in one sentence that says what was found.
    """
    if isinstance(data, str) and data.partition(":")[0] == "demo":
        from dino.data.demo import DemoTiles

        return DemoTiles(data.partition(":")[2] or "train")
    if isinstance(data, (str, os.PathLike)):
        listed = None if Path(data).is_dir() else split_settings(os.fspath(data))
        return Folder(data) if listed is None else FileList(listed[0], **listed[1])
    if isinstance(data, Source):
        return data
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Samples(data)
    raise UserError(
        f"cannot take images from a {type(data).__name__}: "
        "give a folder, demo, or a data set with len() and indexing"
    )


# ---------------------------------------------------------------------------------- folders
class Folder(Files):
    """The images below a folder, sorted by their path; hidden files and folders are skipped.

    If every image lies in some sub-folder, and there are at least two of them, the sub-folders of
    the first level are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, empty, or holds no image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        names = _image_names(Path(root))
        super().__init__(Path(root), names)
        folders = [name.split("/", 1)[0] if "/" in name else None for name in names]
        classes = sorted({folder for folder in folders if folder is not None})
        labelled = None not in folders and len(classes) > 1
        number = {folder: label for label, folder in enumerate(classes)}
        self.classes = classes if labelled else None
        self.labels = [number[folder] for folder in folders if folder] if labelled else None


def _image_names(root: Path) -> list[str]:
    """Paths of all images below `root`, relative to it with forward slashes, sorted."""
    if not root.exists():
        raise UserError(f"{root} does not exist: give --data a folder of images, or demo")
    if not root.is_dir():
        raise UserError(
            f"{root} is a file: give --data a folder of images, or a .txt, .csv or .parquet list"
        )
    names: list[str] = []
    others: Counter[str] = Counter()
    for name in _walk(root):
        extension = _extension(name)
        if extension in EXTENSIONS:
            names.append(name)
        else:
            others[extension or "without extension"] += 1
    if not names and not others:
        raise UserError(f"{root} is empty: give --data a folder of images, or demo")
    if not names:
        ranking = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        found = ", ".join(f"{count} {kind}" for kind, count in ranking[:4])
        kinds = " ".join(EXTENSIONS)
        raise UserError(f"{root} holds no images: found {found}; images end in {kinds}")
    return sorted(names)


def _extension(name: str) -> str:
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return dot + extension.lower() if stem else ""


def _walk(root: Path) -> Iterator[str]:
    """Every visible file below `root`; links are followed, but no folder is entered twice."""
    waiting, entered = [""], set()
    while waiting:
        folder = waiting.pop()
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{root / folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                waiting.append(name)
            else:
                yield name


# ---------------------------------------------------------------------------------- objects
class Samples:
    """A user's data set or sequence of images; see `open_source` for what its items may be.

    Labels are taken from its `targets` (as torchvision's data sets have them), through a
    `torch.utils.data.Subset`, or from the items of a list or tuple of (image, label) pairs.

    Raises:
        UserError: if it is empty.
    """

    def __init__(self, data: Any) -> None:
        if len(data) == 0:
            raise UserError(f"the {type(data).__name__} given as data is empty")
        self._data = data
        self.labels = _labels(data)
        self.classes = None
        if self.labels is not None:
            names = getattr(_innermost(data), "classes", None)
            self.classes = (
                [str(name) for name in names]
                if isinstance(names, (list, tuple)) and len(names) > max(self.labels)
                else [str(label) for label in range(max(self.labels) + 1)]
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` if the item is no image."""
        return as_image(self._data[index], self.path(index))

    def path(self, index: int) -> str:
        """The item's place, since a data set knows no paths."""
        return f"item {index} of the {type(self._data).__name__}"


def _innermost(data: Any) -> Any:
    while isinstance(data, Subset):
        data = data.dataset
    return data


def _labels(data: Any) -> list[int] | None:
    if isinstance(data, Subset):
        inner = _labels(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    labels = getattr(data, "targets", None)
    if isinstance(data, (list, tuple)):
        pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in data)
        labels = [item[1] for item in data] if pairs else None
    if labels is None or len(labels) != len(data):
        return None
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if not all(isinstance(label, (int, np.integer)) and label >= 0 for label in labels):
        return None
    return [int(label) for label in labels]
