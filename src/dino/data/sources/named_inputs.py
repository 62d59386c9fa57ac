"""Images and videos that a command shows, with the names of what is written of each."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dino.data.images.pixel_format import EXTENSIONS, PixelFormat
from dino.data.sources.base import Source
from dino.data.sources.demo import DemoPhotographs
from dino.data.sources.folder import ImageFiles
from dino.data.sources.open import open_source
from dino.files import UserError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".wmv", ".ogv")
"""Endings of video files, in any case."""


@dataclass(frozen=True)
class NamedInput:
    """An image or a video.

    Attributes:
        path: in messages; of a file, where it is.
        name: relative path, without ending, of the files that are written of it.
        source: of an image; None for a video.
        index: of an image in its source.
    """

    path: str
    name: str
    source: Source | None = None
    index: int = 0

    @property
    def title(self) -> str:
        """The name of the file, behind the folders that tell it from the other inputs."""
        return (Path(self.name).parent / Path(self.path).name).as_posix()


def named_inputs(words: Sequence[str], pixels: PixelFormat) -> list[NamedInput]:
    """What some words of a command line name, in their order.

    Args:
        words: image files, videos, patterns such as `photos/*.jpg`, `demo` (the photographs of
            scikit-image), and all that `open_source` takes.
        pixels: channels and range expected of images.

    Returns:
        Inputs with different names, also for file systems without upper case. An image in a folder
        is named by its path in the folder, any other input by its file. Where this is not enough,
        names begin at the folder that all inputs share, and then they keep their endings.

    Raises:
        UserError: if there is nothing to show, or an input is named twice.
    """
    found = [one for word in words for path in _expanded(word) for one in _inputs(path, pixels)]
    paths = [Path(one.path).absolute() for one in found]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise UserError(f"{twice[0]} is named twice: name it once")
    shared = os.path.commonpath([path.parent for path in paths])
    relative = [path.relative_to(shared) for path in paths]
    for names in ([path.with_suffix("") for path in relative], relative):
        counts = Counter(one.name.casefold() for one in found)
        found = [
            one if counts[one.name.casefold()] == 1 else replace(one, name=_safe(name))
            for one, name in zip(found, names, strict=True)
        ]
    return found


def _expanded(word: str) -> list[str]:
    """The files of a pattern, sorted; any other word alone."""
    found = [] if os.path.lexists(word) else glob.glob(word, recursive=True)  # noqa: PTH207
    return sorted(found) or [word]


def _inputs(word: str, pixels: PixelFormat) -> Iterator[NamedInput]:
    """The image or video of a file, or all images of a source."""
    place = Path(word)
    ending = place.suffix.lower()
    one = (ending in VIDEOS or (ending in EXTENSIONS and ending != ".npy")) and not place.is_dir()
    if one and not place.exists():
        raise UserError(f"{word} does not exist: check the name")
    if one and ending in VIDEOS:
        yield NamedInput(word, _safe(Path(place.stem)))
        return
    images = ImageFiles(place.parent, [place.name]) if one else word
    source = open_source(DemoPhotographs() if word == "demo" else images, pixels)
    for index in range(len(source)):
        path = Path(text := source.path(index))
        name = path.relative_to(place) if place in path.parents else Path(path.name)
        yield NamedInput(text, _safe(name.with_suffix("")), source, index)


def _safe(path: Path) -> str:
    """A relative path of characters that all file systems have."""
    parts = (re.sub(r"[^\w.,+ -]", "_", part) for part in path.parts if part.strip("."))
    return "/".join(parts)
