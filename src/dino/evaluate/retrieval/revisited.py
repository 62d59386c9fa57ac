"""Benchmarks of retrieval on disk: Revisited Oxford and Paris, and folders laid out like them.

A benchmark is a folder with images and a ground truth: for each query the images of the database
that show the same thing. The published files are pickles; they are read by an unpickler that knows
lists, dicts, numbers, strings and numpy arrays, and calls nothing else.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.images.decode import Sample, as_picture
from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.folder import ImageFiles
from dino.files import UserError, read_json

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the query image."""


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of one query: indices of images of the database, and its box.

    Attributes:
        easy: images that show the thing clearly.
        hard: images that show it poorly.
        junk: images that count neither as right nor as wrong.
        box: of the thing in the query image; None if unknown.
    """

    easy: list[int]
    hard: list[int]
    junk: list[int]
    box: Box | None = None


class BenchmarkImages(ImageFiles):
    """Images by name in the order of a ground truth, optionally cut to boxes: a `Source`."""

    def __init__(self, root: Path, names: Sequence[str], boxes: Sequence[Box] | None = None):
        super().__init__(root, names)
        self.boxes = boxes

    def cut_to(self, boxes: Sequence[Box]) -> BenchmarkImages:
        """The same images, each cut to its box."""
        return BenchmarkImages(self.root, self._names, boxes)

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` where it cannot be read."""
        image = super().__getitem__(index)
        return image if self.boxes is None else as_picture(image).crop(_rounded(self.boxes[index]))


def _rounded(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge) for edge in box)
    return left, top, right, bottom


@dataclass(frozen=True)
class Benchmark:
    """Images, queries and ground truth.

    Attributes:
        name: of the data set, such as roxford5k.
        database: the images that are searched.
        queries: the full query images.
        truth: one for each query.
        file: the ground truth.
    """

    name: str
    database: BenchmarkImages
    queries: BenchmarkImages
    truth: list[GroundTruth]
    file: Path

    def boxed_queries(self) -> BenchmarkImages:
        """The queries, each cut to its box.

        Raises:
            UserError: if the ground truth lacks a box.
        """
        boxes = [truth.box for truth in self.truth if truth.box is not None]
        if len(boxes) < len(self.truth):
            raise UserError(f"{self.file} has no bbx for some query: use --query whole")
        return self.queries.cut_to(boxes)


def open_benchmark(root: str | os.PathLike[str]) -> Benchmark:
    """Open a folder with `gnd_NAME.pkl` or `gnd.json` and its images.

    The images are in `jpg/`, as published, or in `database/` and `queries/`. The ground truth is a
    dict of `imlist`, `qimlist` (names of images, with or without extension) and `gnd`: for each
    query `easy`, `hard` and `junk` (indices into `imlist`), and `bbx`.

    Raises:
        UserError: if something is missing or does not fit together, naming the file.
    """
    root = Path(root)
    file = _find(root)
    content = _pickled(file) if file.suffix == ".pkl" else read_json(file)
    images, queries, truth = (_list(content, key, file) for key in ("imlist", "qimlist", "gnd"))
    if len(truth) != len(queries):
        raise UserError(
            f"{file} has {len(truth)} queries in gnd but {len(queries)} in qimlist: is it damaged?"
        )
    folders = _folders(root)
    name = file.stem.removeprefix("gnd").removeprefix("_") or root.resolve().name
    return Benchmark(
        name,
        BenchmarkImages(folders[0], _present(images, folders[0], file)),
        BenchmarkImages(folders[1], _present(queries, folders[1], file)),
        [_truth(entry, index, len(images), file) for index, entry in enumerate(truth)],
        file,
    )


def _find(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder: give --benchmark the folder of a retrieval benchmark"
        )
    found = ground_truths(root)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root} holds several ground truths ({names}): keep one of them")
    below = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    inner = [folder for folder in below if ground_truths(folder)]
    hint = f": give --benchmark {inner[0]}" if inner else " (gnd.json or gnd_NAME.pkl)"
    raise UserError(f"{root} holds no ground truth{hint}")


def ground_truths(folder: Path) -> list[Path]:
    """The files of ground truth in a folder."""
    return [*folder.glob("gnd.json"), *sorted(folder.glob("gnd_*.pkl"))]


def _folders(root: Path) -> tuple[Path, Path]:
    """The folders of database and queries."""
    if (root / "jpg").is_dir():
        return root / "jpg", root / "jpg"
    for folder in ("database", "queries"):
        if not (root / folder).is_dir():
            where = "images lie in jpg/, or in database/ and queries/"
            raise UserError(f"{root} lacks the folder {folder}/: {where}")
    return root / "database", root / "queries"


def _list(content: Any, key: str, file: Path) -> list[Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get(key), (list, tuple)):
        raise UserError(f"{file} has no list {key!r}: a ground truth has imlist, qimlist and gnd")
    if not content[key]:
        raise UserError(f"the list {key!r} of {file} is empty")
    return list(content[key])


def _truth(entry: Any, query: int, images: int, file: Path) -> GroundTruth:
    if not isinstance(entry, Mapping):
        raise UserError(f"query {query} in the gnd of {file} is no dict")
    indices = {}
    for kind in ("easy", "hard", "junk"):
        if kind not in entry:
            hint = "is it the revisited version?"
            raise UserError(f"query {query} in {file} has no {kind!r}: {hint}")
        try:
            indices[kind] = [int(index) for index in entry[kind]]
        except (TypeError, ValueError):
            raise UserError(f"{kind!r} of query {query} in {file} is no list of indices") from None
        outside = [index for index in indices[kind] if not 0 <= index < images]
        if outside:
            raise UserError(
                f"query {query} in {file} names image {outside[0]} of {images}: "
                "is it the ground truth of other images?"
            )
    return GroundTruth(**indices, box=_box(entry.get("bbx"), query, file))


def _box(value: Any, query: int, file: Path) -> Box | None:
    if value is None:
        return None
    try:
        left, top, right, bottom = (float(edge) for edge in value)
    except (TypeError, ValueError):
        raise UserError(f"bbx of query {query} in {file} is not four numbers") from None
    if not (left < right and top < bottom):
        raise UserError(f"bbx of query {query} in {file} is empty: left, top, right, bottom")
    return left, top, right, bottom


def _present(names: Sequence[Any], folder: Path, file: Path) -> list[str]:
    """The file of each named image.

    Raises:
        UserError: for the first that is not there.
    """
    known: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        if entry.suffix.lower() in EXTENSIONS:
            known.setdefault(entry.stem, entry.name)
            known[entry.name] = entry.name
    for name in names:
        if name not in known:
            raise UserError(
                f"{file} names the image {name}, which {folder} lacks: "
                "is it the ground truth of other images?"
            )
    return [known[name] for name in names]


# ------------------------------------------------------------------------------------ pickles
def _pickled(file: Path) -> Any:
    """The content of a pickle of plain values and numpy arrays; nothing in it is executed.

    Raises:
        UserError: if it holds anything else, or is damaged.
    """
    try:
        with file.open("rb") as stream:
            return _PlainUnpickler(stream, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(
            f"{file} is no pickle of plain lists, numbers and arrays, and was not loaded: {error}"
        ) from None


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes are encoded as {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 pickles empty bytes for Python 2."""
    return b""


_CORES = ("numpy.core", "numpy._core")  # before and since numpy 2
_REBUILT = np.empty(0).__reduce__()[0]  # the functions that numpy's own pickles name
_FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]
_SCALAR = np.float64(0).__reduce__()[0]

_PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"{core}.multiarray", "_reconstruct"): _REBUILT for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _FROM_BUFFER for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _SCALAR for core in _CORES},
}
"""All that a pickle may name: the parts of numpy's arrays and numbers."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of `_PLAIN`; raises `UnpicklingError` for any other name."""
        try:
            return _PLAIN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None
