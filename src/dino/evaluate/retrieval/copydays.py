"""The benchmark Copydays on disk (Douze et al. 2009), and folders laid out like it."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from dino.data.sources.open import Source, open_source
from dino.files import UserError

LETTERS = 4
"""A strong copy belongs to the originals whose file names have the same first letters."""

LAYOUT = "original/ and strong/, jpegqual/N/ or crops/N/"


@dataclass(frozen=True)
class Block:
    """Copies that were made in one way.

    Attributes:
        name: such as "strong" or "jpegqual/3".
        copies: the images.
        origins: for each, the indices of the originals it was made from.
    """

    name: str
    copies: Source
    origins: list[list[int]]


def open_copydays(root: str | os.PathLike[str]) -> list[Block]:
    """Open a folder with originals and copies of them.

    Strong copies belong to the originals whose names start with the same four letters. In all other
    blocks the i-th copy belongs to the i-th original, in the order of their names.

    Returns:
        "strong" first, and last "original", whose copies are the originals themselves.

    Raises:
        UserError: if a folder is missing or a copy has no original, naming it.
    """
    root = Path(root)
    if not (root / "original").is_dir():
        raise UserError(f"{root} has no folder original/: Copydays has {LAYOUT}")
    originals = open_source(root / "original")
    blocks = [_strong(root / "strong", originals)] if (root / "strong").is_dir() else []
    for kind in ("jpegqual", "crops"):
        blocks += [_aligned(folder, root, originals) for folder in _numbered(root / kind)]
    if not blocks:
        raise UserError(f"{root} has no copies beside its originals: Copydays has {LAYOUT}")
    return [*blocks, _aligned(root / "original", root, originals)]


def _numbered(folder: Path) -> list[Path]:
    """The sub-folders, by their number."""
    if not folder.is_dir():
        return []
    inner = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    if other := [path for path in inner if not path.name.isdecimal()]:
        raise UserError(f"{other[0].name} in {folder} is no number: Copydays has {LAYOUT}")
    return sorted(inner, key=lambda path: int(path.name))


def _strong(folder: Path, originals: Source) -> Block:
    copies = open_source(folder)
    known: dict[str, list[int]] = defaultdict(list)
    for index in range(len(originals)):
        known[Path(originals.path(index)).name[:LETTERS]].append(index)
    paths = [Path(copies.path(index)) for index in range(len(copies))]
    for path in paths:
        if path.name[:LETTERS] not in known:
            raise UserError(
                f"{path} belongs to no original: its name must start with the first {LETTERS} "
                "letters of one"
            )
    return Block("strong", copies, [known[path.name[:LETTERS]] for path in paths])


def _aligned(folder: Path, root: Path, originals: Source) -> Block:
    copies = open_source(folder)
    if len(copies) != len(originals):
        raise UserError(
            f"{folder} holds {len(copies)} images but original/ {len(originals)}: "
            "there must be one copy of each"
        )
    origins = [[index] for index in range(len(originals))]
    return Block(folder.relative_to(root).as_posix(), copies, origins)
