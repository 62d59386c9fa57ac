"""Benchmarks of retrieval on disk: Revisited Oxford and Paris, and folders laid out like them.

A benchmark is a folder with images and a ground truth: for each query the images of the database
that show the same object. The published files are pickles; they are read by an unpickler that knows
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
from dino.weights.safe_pickle import survey

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the query image."""


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of one query: indices of images of the database, and its box.

    Attributes:
        easy: images that show the object clearly.
        hard: images that show it poorly.
        junk: images that count neither as right nor as wrong.
        box: of the object in the query image; None if unknown.
    """

    easy: list[int]
    hard: list[int]
    junk: list[int]
    box: Box | None = None


class BenchmarkImages(ImageFiles):
    """Images by name in the order of a ground truth, optionally cropped to boxes: a `Source`."""

    def __init__(self, root: Path, names: Sequence[str], boxes: Sequence[Box] | None = None):
        super().__init__(root, names)
        self.boxes = boxes

    def __getitem__(self, index: int) -> Sample:
        """Image `index`; raises `ImageError` where it cannot be read."""
        image = super().__getitem__(index)
        if self.boxes is None:
            return image
        left, top, right, bottom = (round(edge) for edge in self.boxes[index])
        return as_picture(image).crop((left, top, right, bottom))


@dataclass(frozen=True)
class Benchmark:
    """Images, queries and ground truth.

    Attributes:
        name: of the data set, such as roxford5k.
        database: the images that are searched.
        queries: the query images, full or cropped to their boxes.
        truth: one for each query.
    """

    name: str
    database: BenchmarkImages
    queries: BenchmarkImages
    truth: list[GroundTruth]


def open_benchmark(root: str | os.PathLike[str], *, boxed: bool = False) -> Benchmark:
    """Open a folder with `gnd_NAME.pkl` or `gnd.json` and its images.

    The images are in `jpg/`, as published, or in `database/` and `queries/`. The ground truth is a
    dict of `imlist`, `qimlist` (names of images, with or without extension) and `gnd`: for each
    query `easy`, `hard` and `junk` (indices into `imlist`), and `bbx`.

    Args:
        root: the folder.
        boxed: crop each query to its box.

    Raises:
        UserError: if something is missing or inconsistent, naming the file.
    """
    root = Path(root)
    file = _find(root)
    content = _pickled(file) if file.suffix == ".pkl" else read_json(file)
    images, queries, gnd = (_list(content, key, file) for key in ("imlist", "qimlist", "gnd"))
    if len(gnd) != len(queries):
        raise UserError(
            f"{file} has {len(gnd)} queries in gnd but {len(queries)} in qimlist: is it damaged?"
        )
    truth = [_truth(entry, index, len(images), file) for index, entry in enumerate(gnd)]
    boxes = [one.box for one in truth if one.box is not None] if boxed else None
    if boxes is not None and len(boxes) < len(truth):
        raise UserError(f"{file} has no bbx for some query: use --query whole")
    folders = [root / name for name in ("database", "queries")]
    if (root / "jpg").is_dir():
        folders = [root / "jpg"] * 2
    return Benchmark(
        file.stem.removeprefix("gnd").removeprefix("_") or root.resolve().name,
        BenchmarkImages(folders[0], _present(images, folders[0], file)),
        BenchmarkImages(folders[1], _present(queries, folders[1], file), boxes),
        truth,
    )


def _find(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give --benchmark the folder of a benchmark")
    found = ground_truths(root)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root} holds several ground truths ({names}): remove all but one")
    if not found:
        inner = [folder for folder in sorted(root.iterdir()) if ground_truths(folder)]
        hint = f": give --benchmark {inner[0]}" if inner else " (gnd.json or gnd_NAME.pkl)"
        raise UserError(f"{root} holds no ground truth{hint}")
    return found[0]


def ground_truths(folder: Path) -> list[Path]:
    """The files of ground truth in a folder, without pipes and devices; none for other paths."""
    found = [*folder.glob("gnd.json"), *sorted(folder.glob("gnd_*.pkl"))]
    return [path for path in found if path.is_file()]


def _list(content: Any, key: str, file: Path) -> list[Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get(key), (list, tuple)):
        raise UserError(f"{file} has no list {key!r}: a ground truth has imlist, qimlist and gnd")
    if not content[key]:
        raise UserError(f"the list {key!r} of {file} is empty")
    return list(content[key])


def _truth(entry: Any, query: int, images: int, file: Path) -> GroundTruth:
    kinds = ("easy", "hard", "junk")
    if not isinstance(entry, Mapping) or not entry.keys() >= {*kinds}:
        hint = "is it the revisited version?"
        raise UserError(f"query {query} in {file} is no dict of easy, hard and junk: {hint}")
    indices = {}
    for kind in kinds:
        try:
            indices[kind] = [int(index) for index in entry[kind]]
        except (TypeError, ValueError):
            raise UserError(f"{kind!r} of query {query} in {file} is no list of indices") from None
        for index in indices[kind]:
            if not 0 <= index < images:
                raise UserError(
                    f"query {query} in {file} names image {index} of {images}: "
                    "is it the ground truth of other images?"
                )
    box = None
    if entry.get("bbx") is not None:
        try:
            left, top, right, bottom = (float(edge) for edge in entry["bbx"])
        except (TypeError, ValueError):
            raise UserError(f"bbx of query {query} in {file} is not four numbers") from None
        if not (left < right and top < bottom):
            raise UserError(f"bbx of query {query} in {file} is empty: left, top, right, bottom")
        box = (left, top, right, bottom)
    return GroundTruth(**indices, box=box)


def _present(names: Sequence[Any], folder: Path, file: Path) -> list[str]:
    """The file of each named image."""
    if not folder.is_dir():
        where = "images lie in jpg/, or in database/ and queries/"
        raise UserError(f"{folder.parent} lacks the folder {folder.name}/: {where}")
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
    """The content of a pickle of plain values and numpy arrays; nothing in it is executed."""
    with file.open("rb") as stream:
        try:
            survey(stream, file)
            stream.seek(0)
            return _PlainUnpickler(stream, encoding="latin1").load()
        except UserError:
            raise
        except Exception as error:  # damaged bytes raise nearly anything
            raise UserError(
                f"{file} is no pickle of plain lists, numbers and arrays, and was not loaded: "
                f"{error}"
            ) from None


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes are encoded as {encoding}")
    return text.encode("latin1")


_PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how Python 3 pickles empty bytes for Python 2
}
"""All that a pickle may name: what numpy's arrays and numbers consist of."""

for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _PLAIN[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _PLAIN[f"{_core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    _PLAIN[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _PLAIN[module, name]
