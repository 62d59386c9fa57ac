"""Folders of images: their files, classes and splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dino.data.images.other_formats import REMEDIES
from dino.data.images.pixel_format import EXTENSIONS, is_dicom
from dino.data.sources.base import Source, warn
from dino.data.sources.dicom_series import ordered
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

_EXTENSIONS = frozenset(EXTENSIONS)

THREADS, CHUNK = 16, 16
"""Threads, which mostly wait for a disk or server, and folders that each lists at a time."""


class ImageFiles(Source):
    """Images in files, by their names in order; relative names start from `root`."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root, self._folder = root, os.fspath(root)
        self._names = PackedStrings(names)

    def __len__(self) -> int:
        return len(self._names)

    def content(self, index: int) -> str:
        """The image's file."""
        return self.path(index)

    def path(self, index: int) -> str:
        """The image's file."""
        # Not by pathlib: it interns each part, which writes to pages that workers share.
        return os.path.join(self._folder, self._names[index])  # noqa: PTH118

    def identity(self) -> list[bytes]:
        """The names of the files, relative to `root`; neither their sizes nor their pixels."""
        return [self._names.ends.tobytes(), self._names.text.tobytes()]


class Folder(ImageFiles):
    """The images below a folder, sorted (`image_names`); hidden files and folders are skipped.

    If every image lies in some sub-folder, and there are at least two of them, the sub-folders of
    the first level are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, empty, holds no image, or is divided into
            splits.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        root = Path(root)
        if not os.path.isdir(root):  # noqa: PTH112, Path's raises for very long names
            reason = "is a file" if os.path.exists(root) else "does not exist"  # noqa: PTH110
            name = root.name.lower()
            remedies = [what for ending, what in REMEDIES.items() if name.endswith(ending)]
            raise UserError(f"{root} {reason}: {(remedies or [f'give --data {KINDS}'])[-1]}")
        if found := [str(path) for path in splits(root).values()]:
            raise UserError(
                f"{root} is divided into splits, which are no classes: "
                f"give one folder of images ({', '.join(found)})"
            )
        names, self.left_out = image_names(root)
        super().__init__(root, names)
        folders = [name.partition("/")[0] for name in names if "/" in name]
        classes = sorted(set(folders))
        if len(folders) == len(names) and len(classes) > 1:
            label = {folder: number for number, folder in enumerate(classes)}
            self.classes, self.labels = classes, [label[folder] for folder in folders]


def splits(root: str | os.PathLike[str]) -> dict[str, Path]:
    """The folders of a data set that is divided into splits, by "train", "val" and "test".

    They lie in `root`, or in its only folder where it has no images beside it. Of several names for
    one split the first in the order of `SPLITS` counts. Empty for anything but a divided folder.
    """
    for folder in (os.fspath(root), _only_folder(root)):
        subfolders = {split: _subfolder(folder, names) for split, names in SPLITS.items()}
        if found := {split: Path(path) for split, path in subfolders.items() if path}:
            return found
    return {}


def use_splits(data: Any, val: Any) -> tuple[Any, Any]:
    """Images to learn from and images to measure on, where one folder may hold both.

    Of a folder that is divided, `train` is taken, and `val` where `val` is None; one sentence on
    stderr says so. The split `test` is never taken. All else is returned as it is.
    """
    found = splits(data) if isinstance(data, (str, os.PathLike)) else {}
    if "train" not in found:
        return data, val
    also = ""
    if val is None and (val := found.get("val")):
        also = f", and images to measure on from {val}"
    warn(
        f"{data} is divided into splits: images to learn from are taken from {found['train']}"
        f"{also}; nothing else in it is used"
    )
    return found["train"], val


def _subfolder(folder: str, names: Sequence[str]) -> str | None:
    """The first that exists of the names, each in lower case, as a title or in capitals."""
    spellings = [word for name in names for word in (name, name.title(), name.upper())]
    paths = (os.path.join(folder, word) for word in spellings)  # noqa: PTH118
    return next(filter(os.path.isdir, paths), None)


def _only_folder(root: str | os.PathLike[str]) -> str:
    """The only folder in `root`, where no image lies beside it; else `root` itself."""
    with suppress(OSError), os.scandir(root) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        relevant = (entry for entry in visible if _is_image(entry.name) or entry.is_dir())
        first = list(islice(relevant, 2))  # `root` may hold a million images
        if len(first) == 1 and first[0].is_dir():
            return first[0].path
    return os.fspath(root)


def image_names(root: Path) -> tuple[list[str], Counter[str]]:
    """All images below a folder, and the number of other files by their ending.

    Hidden files and folders are left out. Links are followed, but no folder is entered twice.

    Returns:
        Paths relative to `root` with forward slashes, sorted, but the slices of a DICOM series in
        a folder by their position; endings in lower case with their dot.

    Raises:
        UserError: if a folder cannot be read, or there is no image.
    """
    files, special = _visible_files(root)
    names: list[str] = []
    others = +Counter({SPECIAL: special})
    scans: set[str] = set()
    for name in files:
        if _is_image(name):
            names.append(name)
            if name[-4:].lower() == ".dcm":
                scans.add(name)
            continue
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122, pathlib is slow
        if may_be_dicom(ending) and _starts_as_dicom(root / name):
            names.append(name)
            scans.add(name)
        else:
            others[ending] += 1
    if names:
        names.sort()
        places = [place for place, name in enumerate(names) if name in scans] if scans else []
        return ordered(root, names, places) if len(places) > 1 else names, others
    if not others:
        raise UserError(f"{root} is empty: give --data a folder of images, or demo")
    found = count_kinds(others)
    if others.keys() == {".tar"}:
        raise UserError(f"{root} holds {found}: give --data '{root}/NAME-{{000..NNN}}.tar'")
    if others.keys() == {".parquet"}:
        raise UserError(f"{root} holds {found}: give --data one of them, or hf:{root}")
    raise UserError(f"{root} holds no images: found {found}; images end in {' '.join(EXTENSIONS)}")


def may_be_dicom(ending: str) -> bool:
    """Whether files of this ending, such as "" or ".17", may be DICOM, which needs none."""
    return ending[1:].isdecimal() or not ending


def _starts_as_dicom(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return is_dicom(file.read(132))
    return False


def _is_image(name: str) -> bool:
    _, dot, ending = name.rpartition(".")  # not by os.path: this runs a million times
    return dot + ending.lower() in _EXTENSIONS


def count_kinds(kinds: Mapping[str, int]) -> str:
    """Such as "3 .txt, 1 .csv", the four most frequent."""
    named = ((kind or "without extension", count) for kind, count in kinds.items())
    ranking = sorted(named, key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in ranking[:4]]
    return ", ".join([*shown, "others"] if len(ranking) > 4 else shown)


def warn_left_out(name: str, kinds: Mapping[str, int], needed: str = "images") -> None:
    """One sentence on stderr counts files that are not read, being no `needed`; none for none."""
    if count := sum(kinds.values()):
        files = "1 file is" if count == 1 else f"{count:,} files are"
        warn(f"{name}: {files} left out, being no {needed}: {count_kinds(kinds)}")


# ---------------------------------------------------------------------------------- the walk
def _visible_files(root: Path) -> tuple[list[str], int]:
    """The regular files below `root`, relative to it, and the number of special files."""
    # Level by level: of two paths to one folder the shorter one counts, then the first by name.
    entered: set[tuple[int, int]] = set()
    names: list[str] = []
    special, level = 0, [""]
    with ThreadPoolExecutor(THREADS) as pool, bar("folders", None) as advance:
        while level:
            below: list[str] = []
            chunks = [level[start : start + CHUNK] for start in range(0, len(level), CHUNK)]
            lists = pool.map(lambda chunk: [_list(root / folder) for folder in chunk], chunks)
            listed = zip(level, chain.from_iterable(lists), strict=True)
            for folder, (identity, files, folders, count) in listed:
                if identity in entered:
                    continue
                entered.add(identity)
                prefix = f"{folder}/" if folder else ""
                names += [prefix + name for name in files]
                below += [prefix + name for name in folders]
                special += count
            advance(len(level))
            level = sorted(below)
    return names, special


def _list(path: Path) -> tuple[tuple[int, int], list[str], list[str], int]:
    """Device and inode of a folder, names of its files and folders, number of special files."""
    files: list[str] = []
    folders: list[str] = []
    special = 0
    try:
        status = path.stat()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                missing = entry.is_symlink() and not os.path.exists(entry)  # noqa: PTH110, broken or circular
                if missing or entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
                else:
                    special += 1
    except OSError as error:
        raise UserError(
            f"the folder {path} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from None
    return (status.st_dev, status.st_ino), files, folders, special
