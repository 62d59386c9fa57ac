"""Foreign `.pth` files, read without running anything that lies in them.

A pickle is a program. It is first gone through with every class and function it names replaced by
a dummy (`survey`): that shows what it names and how large its tensors claim to be, and executes
nothing. Only if all names are known to be harmless, and the sizes fit into the file, does PyTorch
read it, with `weights_only=True` and the data mapped instead of copied.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from dino.files import UserError

PICKLE_LIMIT = 2 * 2**20
"""Bytes of pickle, without tensors; a full checkpoint with optimizer has some hundred thousand."""

ITEM_SIZES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Untyped", "QUInt8", "QInt8"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2")
_HARMLESS = {
    *(f"torch.{name}Storage" for name in ITEM_SIZES),
    *("torch.storage.UntypedStorage", "torch.Size", "torch.device", "torch.Tensor"),
    *("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.int64"),
    *("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"),
    *("collections.OrderedDict", "argparse.Namespace", "_codecs.encode"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"),
}
"""What checkpoints of the published code hold beside tensors: argparse's settings with a path of
the cluster, numbers of numpy. Nothing of this does anything when it is built."""


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote into `path`: tensors on the CPU in nested dictionaries.

    Raises:
        UserError: if the file is no checkpoint, not whole, claims more than it holds, or names a
            class or function that weights do not need; nothing of it has then been executed.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        (_check_zip if mapped else _check_legacy)(path)
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole PyTorch checkpoint ({reason})") from None
    return content


def _allowed() -> list[Any]:
    """What PyTorch may build beside tensors, under the names that old and new files have for it."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    return [
        argparse.Namespace,
        *(
            type(name, (PurePosixPath,), {"__module__": module})
            for module, name in (
                ("pathlib", "PosixPath"),
                ("pathlib._local", "PosixPath"),
                ("pathlib", "PurePosixPath"),
            )
        ),
        *(_called(scalar, f"numpy.{core}.multiarray") for core in ("core", "_core")),
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _called(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    """`function` under its own name in another module."""

    def same(*arguments: Any) -> Any:
        return function(*arguments)

    same.__module__, same.__qualname__ = module, function.__name__
    return same


# ------------------------------------------------------------------------------------ containers
def _check_zip(path: Path) -> None:
    """The layout since PyTorch 1.6: one record for the pickle, one for each storage."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise UserError(f"{path} is a compressed archive, not what torch.save writes")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise UserError(f"{path} claims to hold more than its own size")
        names = {record.filename: record.file_size for record in records}
        pickled = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickled) != 1 or any(name.endswith("/constants.pkl") for name in names):
            raise UserError(f"{path} is an archive, but not a checkpoint that torch.save wrote")
        if names[pickled[0]] > PICKLE_LIMIT:
            raise UserError(
                f"{path} holds {names[pickled[0]]:,} bytes of pickle: that is no weight"
            )
        with archive.open(pickled[0]) as file:
            storages = survey(file, path)
    folder = pickled[0].removesuffix("data.pkl")
    for key, size in storages.items():
        if size > names.get(f"{folder}data/{key}", 0):
            raise UserError(f"{path} claims {size:,} bytes for a tensor that has fewer")


def _check_legacy(path: Path) -> None:
    """The layout before PyTorch 1.6: five pickles one after another, then the storages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise UserError(
                f"{path} is neither safetensors nor a PyTorch checkpoint: is it the right file?"
            )
        pickles = io.BytesIO(b"\x80" + file.read(PICKLE_LIMIT))
    storages: dict[str, int] = {}
    for _ in range(5):  # magic number, protocol, machine, the content, the storages' keys
        storages.update(survey(pickles, path))
    if sum(storages.values()) > size:
        raise UserError(f"{path} claims to hold more than its own size of {size:,} bytes")


# ------------------------------------------------------------------------------------ the survey
def survey(file: Any, path: Path) -> dict[str, int]:
    """Go through the next pickle of `file` with a dummy in the place of all that it names.

    Returns:
        The bytes that each storage claims, by its key.

    Raises:
        UserError: for a name that is not known to be harmless, or a tensor larger than its storage.
    """
    dry = _Dry(file, path)
    dry.load()
    return dry.storages


@dataclass(frozen=True)
class _Storage:
    count: int


class _Dummy:
    """Takes whatever a pickle does to it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dry(pickle._Unpickler):
    """The pure Python unpickler: the one in C sets memory aside for a memo of any size."""

    proto: int

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A dummy for every known name."""
        if self.proto < 3:  # then Python 2's names stand for those of today
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if module == "torch._utils" and name in _REBUILD:
            return self._rebuild
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in _HARMLESS or (module == "numpy.dtypes" and name.endswith("DType")):
            return type(name, (_Dummy,), {})
        raise UserError(
            f"{self.path} is refused: it would run or build {full}, which weights do not need "
            "(nothing was executed)"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", class, key, device, number of elements)."""
        _, kind, key, _, count = pid[:5]
        name = kind if isinstance(kind, str) else kind.__name__
        item = ITEM_SIZES[name.removesuffix("Storage")]
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{self.path} holds a tensor of {count!r} elements")
        key = str(key)
        self.storages[key] = max(item * count, self.storages.get(key, 0))
        return _Storage(count)

    def _rebuild(self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Dummy:
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if min(offset, *size, *stride, 0) < 0 or (count and max(reach, count) > storage.count):
            raise UserError(
                f"{self.path} claims a tensor of shape {tuple(size)} in {storage.count} elements"
            )
        return _Dummy()
