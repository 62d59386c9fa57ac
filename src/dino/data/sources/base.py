"""The protocol of sources: a length, images by index, names, labels and a digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from dino.data.images.decode import OpenedImage, Sample, open_image
from dino.data.images.image_errors import Defect, ImageError
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.files import UserError
from dino.progress import Console
from dino.runtime import ranks


class Source:
    """Images by index.

    A kind of source defines `__len__`, `path` and either `content` (what `open_image` takes) or
    `__getitem__` (the decoded image). All else has defaults.

    Attributes:
        pixels: channels and range expected of the images (set by `open_source`).
        labels: class index of each image, or None where there are no classes.
        classes: name of each class, or None.
        left_out: number of files that are not read, by their ending in lower case.
        blocks: lengths of the runs of images that are stored together, int64 [number of runs]; None
            where any order of visits is equally fast.
    """

    pixels: PixelFormat = RGB
    labels: list[int] | None = None
    classes: list[str] | None = None
    left_out: Mapping[str, int] = MappingProxyType({})
    blocks: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Name of image `index` in messages and tables; its path where it is a file."""
        raise NotImplementedError

    def class_name(self, index: int) -> str:
        """The class of image `index`; "" where there are no classes."""
        if self.labels is None:
            return ""
        label = self.labels[index]
        return self.classes[label] if self.classes else f"class {label}"

    def content(self, index: int) -> Any:
        """A path, an open binary file or a sample, as `open_image` takes them."""
        return self[index]

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` if it cannot be used."""
        with self.open(index) as image:
            return image.decode()

    def open(self, index: int) -> AbstractContextManager[OpenedImage]:
        """Image `index`, its size known, its pixels not decoded yet; see `open_image`."""
        return open_image(self.content(index), self.path(index), self.pixels)

    def digest(self) -> str:
        """A hash of what the source holds, 64 hexadecimal digits; equal on all machines and ranks.

        It covers the number of images, labels, classes and `identity`. Images that changed under
        the same names are noticed only where `identity` covers their content.
        """
        labels = b"" if self.labels is None else np.asarray(self.labels, np.int64).tobytes()
        classes = "\0".join(self.classes or ()).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(b"%d" % len(self))
        for content in (labels, classes, *self.identity()):
            digest.update(b" %d " % len(content))
            digest.update(content)
        return digest.hexdigest()

    def identity(self) -> Iterable[bytes]:
        """What distinguishes these images from others; by default their names."""
        return [self.path(index).encode("utf-8", "surrogatepass") for index in range(len(self))]


def sampled(values: np.ndarray) -> bytes:
    """Shape, type and 4,096 evenly spaced values of an array, for `Source.identity`."""
    sample = values.flat[:: max(1, values.size // 4_096)]
    return f"{values.shape} {values.dtype.str} ".encode() + sample.tobytes()


def shared_folder(paths: Sequence[str]) -> str:
    """The common folder of absolute paths, exactly as they are spelled; "" for other paths."""
    prefix = os.path.commonprefix([min(paths), max(paths)])  # noqa: RUF071, for exactly its length
    return os.path.dirname(prefix) if os.path.isabs(prefix) else ""  # noqa: PTH117, PTH120


def number_classes(labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """The classes among some labels, in order, and the number of each label's class.

    Classes that are all integers are ordered by size, others by name.
    """
    names = set(labels)
    integers = all(name.removeprefix("-").isdecimal() for name in names)
    classes = sorted(names, key=(lambda name: (int(name), name)) if integers else None)
    number = {name: index for index, name in enumerate(classes)}
    return classes, [number[label] for label in labels]


def split_settings(data: str, form: str, what: str) -> tuple[str, dict[str, str]]:
    """The name and the settings of `NAME?one=1&two=2`; `what` is named in the error.

    Raises:
        UserError: for a setting that `form`, as in `NAME?one=NUMBER&two=NUMBER`, does not have.
    """
    name, mark, query = data.rpartition("?")
    if not mark:
        return data, {}
    settings = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    known = {pair.partition("=")[0] for pair in form.partition("?")[2].split("&")}
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"{unknown[0]!r} is no setting of {what}: write {form}")
    return name, settings


@contextmanager
def image_errors(name: str, defect: Defect) -> Iterator[None]:
    """Turn the errors of readers of files into an `ImageError`, "missing" or of a given defect."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, "there is no such file", "missing") from error
    except (OSError, SyntaxError, ValueError, IndexError) as error:
        raise ImageError(name, str(error), defect) from error


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Import a package within this context that an extra of ours installs.

    Raises:
        UserError: if it is not installed; `purpose` names what needs it.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{purpose} needs {error.name}: pip install 'dino-ssl[{extra}]'") from None


def warn(sentence: str) -> None:
    """Print a sentence about the data on stderr, once for all ranks."""
    if ranks().main:
        Console(stderr=True).print(sentence, style="yellow", soft_wrap=True)
