"""A folder of images: what it holds, and the splits that it may be divided into."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.base import Source, warn
from dino.data.sources.packed_strings import PackedStrings
from dino.files import UserError
from dino.progress import bar

KINDS = (
    "a folder of images, a .txt, .csv, .tsv or .parquet list, .tar shards, a .npy array, hf:NAME, "
    "torchvision:NAME, or demo"
)
"""What `--data` may be."""

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
"""Names of folders, in any case, that are splits of a data set and never classes."""

SPECIAL = "special"
"""Stands in `left_out` for named pipes, sockets and devices, whatever their ending."""

_ENDINGS = frozenset(ending.removeprefix(".") for ending in EXTENSIONS)

THREADS = 16
"""They mostly wait, for a disk or a server."""
SHARE = 16
"""Folders that a thread lists at a time."""


class ImageFiles(Source):
    """Images that lie in files.

    Args:
        root: folder that relative names start from.
        names: of the files, in the order of the source.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root, self._folder = root, os.fspath(root)
        self._names = PackedStrings(names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def content(self, index: int) -> str:
        """The image's file; raises `ImageError` for a pipe or device, which might never end."""
        path = self.path(index)
        if not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113, never raise
            raise ImageError(path, "it is no regular file", "unreadable")
        return path

    def path(self, index: int) -> str:
        """The image's file."""
        # Not by pathlib: it interns each part, which writes to pages that workers share.
        return os.path.join(self._folder, self._names[index])  # noqa: PTH118

    def identity(self) -> list[bytes]:
        """The names of the files, relative to `root`; neither their sizes nor their pixels."""
        return [self._names.ends.tobytes(), self._names.text.tobytes()]


class Folder(ImageFiles):
    """The images below a folder, sorted by their path; hidden files and folders are skipped.

    If every image lies in some sub-folder, and there are at least two of them, the sub-folders of
    the first level are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, empty, holds no image, or is divided into
            splits.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        root = Path(root)
        if not os.path.exists(root):  # noqa: PTH110, Path's raises for very long names
            raise UserError(f"{root} does not exist: give --data {KINDS}")
        if not os.path.isdir(root):  # noqa: PTH112
            raise UserError(f"{root} is a file: give --data {KINDS}")
        if parts := [str(path) for path in splits(root).values()]:
            raise UserError(
                f"{root} is divided into splits, which are no classes: "
                f"give one folder of images ({', '.join(parts)})"
            )
        names, self.left_out = image_names(root)
        super().__init__(root, names)
        folders = [name.split("/", 1)[0] if "/" in name else None for name in names]
        classes = sorted({folder for folder in folders if folder is not None})
        if None not in folders and len(classes) > 1:
            number = {folder: label for label, folder in enumerate(classes)}
            self.classes, self.labels = classes, [number[folder] for folder in folders if folder]


def splits(root: str | os.PathLike[str]) -> dict[str, Path]:
    """The folders of a data set that is divided into splits, by "train", "val" and "test".

    They lie in `root`, or in its only folder where it has no images beside it. Of several names for
    one split the first in the order of `SPLITS` counts. Empty for anything but a divided folder.
    """
    for folder in (os.fspath(root), _only_folder(root)):
        named = {
            split: [path for alias in aliases for path in _spelled(folder, alias)]
            for split, aliases in SPLITS.items()
        }
        if found := {split: Path(paths[0]) for split, paths in named.items() if paths}:
            return found
    return {}


def use_splits(data: Any, val: Any) -> tuple[Any, Any]:
    """Images to learn from and images to measure on, where one folder may hold both.

    Of a folder that is divided, `train` is taken, and `val` where `val` is None; one sentence on
    stderr says so. The split `test` is never taken. All else is returned as it is.
    """
    parts = splits(data) if isinstance(data, (str, os.PathLike)) else {}
    if "train" not in parts:
        return data, val
    if val is None and "val" in parts:
        val = parts["val"]
        also = f", and images to measure on from {val}"
    else:
        also = ""
    warn(
        f"{data} is divided into splits: images to learn from are taken from {parts['train']}"
        f"{also}; nothing else in it is used"
    )
    return parts["train"], val


def _spelled(folder: str, name: str) -> list[str]:
    """The folders in `folder` that are called `name`, in lower case, capitals, or as a title."""
    spellings = (os.path.join(folder, word) for word in (name, name.title(), name.upper()))  # noqa: PTH118
    return [path for path in spellings if os.path.isdir(path)]  # noqa: PTH112, never raises


def _only_folder(root: str | os.PathLike[str]) -> str:
    """The one folder in `root`, where no image lies beside it; else `root` itself."""
    found = []
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:  # up to the second one: `root` may hold a million images
            if not entry.name.startswith(".") and (_is_image(entry.name) or entry.is_dir()):
                found.append(entry)
                if len(found) == 2:
                    break
    return found[0].path if len(found) == 1 and found[0].is_dir() else os.fspath(root)


def image_names(root: Path) -> tuple[list[str], Counter[str]]:
    """All images below a folder, and the number of other files by their ending.

    Hidden files and folders are left out. Links are followed, but no folder is entered twice.

    Returns:
        Paths relative to `root` with forward slashes, sorted; endings in lower case with their dot.

    Raises:
        UserError: if a folder cannot be read, or there is no image.
    """
    files, special = visible_files(root)
    names: list[str] = []
    others = +Counter({SPECIAL: special})
    for name in files:
        if _is_image(name):
            names.append(name)
        else:
            others[extension_of(name)] += 1
    if names:
        return sorted(names), others
    if not others:
        raise UserError(f"{root} is empty: give --data a folder of images, or demo")
    found = count_kinds(others)
    if others.keys() == {".tar"}:
        raise UserError(f"{root} holds {found}: give --data '{root}/NAME-{{000..NNN}}.tar'")
    if others.keys() == {".parquet"}:
        raise UserError(f"{root} holds {found}: give --data one of them, or hf:{root}")
    raise UserError(f"{root} holds no images: found {found}; images end in {' '.join(EXTENSIONS)}")


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _ENDINGS  # a million times


def extension_of(name: str) -> str:
    """The last ending of a path in lower case, with its dot; empty for none and for `.name`."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return dot + extension.lower() if stem else ""


def count_kinds(kinds: Mapping[str, int]) -> str:
    """Such as "3 .txt, 1 .csv", the four most frequent."""
    named = ((kind or "without extension", count) for kind, count in kinds.items())
    ranking = sorted(named, key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in ranking[:4]]
    return ", ".join([*shown, "others"] if len(ranking) > 4 else shown)


# ---------------------------------------------------------------------------------- the walk
@dataclass
class _Listing:
    """What a folder holds: its device and inode, names of files and folders, number of specials."""

    identity: tuple[int, int]
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    special: int = 0


def visible_files(root: Path) -> tuple[list[str], int]:
    """Every file below `root` that is not hidden, relative to it, in no particular order.

    Level by level, so that of two ways to one folder always the same is taken: the shorter one,
    then the one that sorts first.

    Returns:
        The files, and the number of named pipes, sockets and devices.

    Raises:
        UserError: for a folder that cannot be read, naming it.
    """
    entered: set[tuple[int, int]] = set()
    names: list[str] = []
    special, level = 0, [""]
    with ThreadPoolExecutor(THREADS) as pool, bar("folders", None) as advance:
        while level:
            below: list[str] = []
            shares = [level[start : start + SHARE] for start in range(0, len(level), SHARE)]
            listed = pool.map(lambda share: [_list(root / folder) for folder in share], shares)
            for folder, listing in zip(level, chain.from_iterable(listed), strict=True):
                if listing.identity in entered:
                    continue
                entered.add(listing.identity)
                prefix = f"{folder}/" if folder else ""
                names += [prefix + name for name in listing.files]
                below += [prefix + name for name in listing.folders]
                special += listing.special
            advance(len(level))
            level = sorted(below)
    return names, special


def _list(path: Path) -> _Listing:
    try:
        status = path.stat()
        found = _Listing((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                link = entry.is_symlink()
                if os.path.isdir(entry) if link else entry.is_dir():  # noqa: PTH112, never raises
                    found.folders.append(entry.name)
                elif os.path.isfile(entry) if link else entry.is_file():  # noqa: PTH113
                    found.files.append(entry.name)
                elif link and not os.path.exists(entry):  # noqa: PTH110, broken or circular
                    found.files.append(entry.name)  # a file that is missing
                else:
                    found.special += 1
    except OSError as error:
        raise UserError(
            f"the folder {path} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from None
    return found
