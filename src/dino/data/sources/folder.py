"""Which images a folder holds: found by several threads, and remembered for the next time.

A folder is listed once. What it held is kept in the cache folder
(`dino.data.sources.array_cache`), together with
its inode and the times of its last changes, which a new, removed or renamed entry moves. The next
start asks each folder for these only, and lists those in which something has changed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.array_cache import keep, recall
from dino.files import UserError
from dino.progress import bar

KINDS = (
    "a folder of images, a .txt, .csv, .tsv or .parquet list, .tar shards, a .npy array, hf:NAME, "
    "torchvision:NAME, or demo"
)
"""What `--data` may be."""

THREADS = 16
"""They mostly wait, for a disk or a server."""
SHARE = 16
"""Folders that a thread is given at a time."""
KEPT_FROM = 1_000
"""Entries; what is smaller is listed anew, which is as fast."""
SETTLING = 2_000_000_000
"""Nanoseconds: a folder that changed within them may change again without its time moving."""


def image_names(root: Path) -> list[str]:
    """Paths of all images below a folder, relative to it with forward slashes, sorted.

    Hidden files and folders are left out. Links are followed, but no folder is entered twice.

    Raises:
        UserError: if the folder is missing, unreadable, empty, or holds no image.
    """
    if not os.path.exists(root):  # noqa: PTH110, Path's raises for very long names
        raise UserError(f"{root} does not exist: give --data {KINDS}")
    if not root.is_dir():
        raise UserError(f"{root} is a file: give --data {KINDS}")
    files = visible_files(root)
    names = sorted(name for name in files if name.lower().endswith(EXTENSIONS))
    if names:
        return names
    others = Counter(extension_of(name) or "without extension" for name in files)
    if not others:
        raise UserError(f"{root} is empty: give --data a folder of images, or demo")
    found = count_kinds(others)
    if others.keys() == {".tar"}:
        raise UserError(f"{root} holds {found}: give --data '{root}/NAME-{{000..NNN}}.tar'")
    kinds = " ".join(EXTENSIONS)
    raise UserError(f"{root} holds no images: found {found}; images end in {kinds}")


def extension_of(name: str) -> str:
    """The last ending of a path in lower case, with its dot; empty for none and for `.name`."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return dot + extension.lower() if stem else ""


def count_kinds(kinds: Counter[str]) -> str:
    """Such as "3 .txt, 1 .csv", the four most frequent."""
    ranking = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ranking[:4])


# ---------------------------------------------------------------------------------- the walk
@dataclass(frozen=True)
class Listing:
    """What a folder holds, and the state of the folder in which that is so.

    Attributes:
        state: device, inode, times of the last change of its entries and of its own, modulo 2**64.
        files: names of files.
        folders: names of folders.
        links: names of links, whose targets may change without a trace in this folder.
        settled: whether another change would show in `state`.
    """

    state: tuple[int, ...]
    files: list[str]
    folders: list[str]
    links: list[str]
    settled: bool = True


@dataclass
class _Found:
    """A folder looked at: its listing, what its links are now, and whether it had to be listed."""

    listing: Listing
    linked_files: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)
    new: bool = False


def visible_files(root: Path) -> list[str]:
    """Every file below `root` that is not hidden, relative to it, in no particular order.

    Level by level, so that of two ways to one folder always the same is taken: the shorter one,
    then the one that sorts first.

    Raises:
        UserError: for a folder that cannot be read, naming it.
    """
    known = _recall(root)
    found: dict[str, _Found] = {}
    entered: set[tuple[int, ...]] = set()
    names: list[str] = []
    level = [""]
    with ThreadPoolExecutor(THREADS) as pool, bar("folders", None) as advance:
        while level:
            shares = [level[start : start + SHARE] for start in range(0, len(level), SHARE)]
            looked = chain.from_iterable(pool.map(partial(_look_at, root, known), shares))
            below: list[str] = []
            for folder, entry in zip(level, looked, strict=True):
                if entry.listing.state[:2] in entered:
                    continue
                entered.add(entry.listing.state[:2])
                found[folder] = entry
                names += _joined(folder, chain(entry.listing.files, entry.linked_files))
                below += _joined(folder, chain(entry.listing.folders, entry.linked_folders))
            advance(len(level))
            level = sorted(below)
    if len(names) + len(found) >= KEPT_FROM and (
        found.keys() != known.keys() or any(entry.new for entry in found.values())
    ):
        _keep(root, {name: entry.listing for name, entry in found.items()})
    return names


def _joined(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names] if folder else list(names)


def _look_at(root: Path, known: dict[str, Listing], folders: list[str]) -> list[_Found]:
    return [_look(root / folder, known.get(folder)) for folder in folders]


def _look(path: Path, known: Listing | None) -> _Found:
    """What is in a folder now, from memory if it has not changed."""
    try:
        now = time.time_ns()
        status = path.stat()
        state = _state(status)
        if known is not None and known.state == state:
            found = _Found(known)
        else:
            settled = max(status.st_mtime_ns, status.st_ctime_ns) < now - SETTLING
            found = _Found(_list(path, state, settled), new=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for name in found.listing.links:  # a broken one counts as a file, which is then missing
        folder = os.path.isdir(path / name)  # noqa: PTH112, as an OSError is no folder either
        (found.linked_folders if folder else found.linked_files).append(name)
    return found


def _state(status: os.stat_result) -> tuple[int, ...]:
    values = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return tuple(value % 2**64 for value in values)


def _list(path: Path, state: tuple[int, ...], settled: bool) -> Listing:
    files, folders, links = [], [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                links.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
            else:
                files.append(entry.name)
    return Listing(state, sorted(files), sorted(folders), sorted(links), settled)


# ---------------------------------------------------------------------------------- memory
def _recall(root: Path) -> dict[str, Listing]:
    kept = recall("folders", _key(root))
    try:
        text, ends = kept["text"].tobytes(), kept["ends"].tolist()
        states = kept["states"].tolist()
        known, start = {}, 0
        for state, stops in zip(states, ends, strict=True):
            parts = []
            for stop in stops:
                parts.append(os.fsdecode(text[start:stop]))
                start = stop
            folder, *lists = parts
            files, folders, links = (part.split("\0") if part else [] for part in lists)
            known[folder] = Listing(tuple(state), files, folders, links)
    except (KeyError, ValueError, TypeError):  # none, or not written here
        return {}
    return known


def _keep(root: Path, found: dict[str, Listing]) -> None:
    parts: list[bytes] = []
    states = []
    for folder, listing in found.items():
        if listing.settled:
            states.append(listing.state)
            lists = (listing.files, listing.folders, listing.links)
            parts += map(os.fsencode, (folder, *map("\0".join, lists)))
    if not states:
        return
    arrays: dict[str, np.ndarray] = {
        "text": np.frombuffer(b"".join(parts), dtype=np.uint8),
        "ends": np.cumsum([len(part) for part in parts], dtype=np.int64).reshape(-1, 4),
        "states": np.array(states, dtype=np.uint64).reshape(-1, 4),
    }
    keep("folders", _key(root), arrays)


def _key(root: Path) -> str:
    return f"1 {root.absolute()}"  # the number of this format
