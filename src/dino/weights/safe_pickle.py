"""Foreign `.pth` files, read without running anything in them.

A pickle is a program. PyTorch reads it with `weights_only=True` and builds listed classes only;
those that checkpoints hold beside tensors are replaced by empty placeholders. `weights_only` by
itself still hangs or fills the memory on files of a few kilobytes (a dictionary key of tuples
nested 40 times, one list copied a million times), so every pickle is first surveyed: it is run with
dummies in the place of all that it names.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from dino.files import UserError

PICKLE_LIMIT = 2 * 2**20
"""Bytes of pickle, without tensors; a full checkpoint with optimizer has some hundred thousand."""

_BESIDE_TENSORS = """
argparse.Namespace types.SimpleNamespace collections.defaultdict collections.deque datetime.datetime
datetime.date datetime.timedelta decimal.Decimal fractions.Fraction uuid.UUID builtins.set
builtins.frozenset builtins.list builtins.dict builtins.tuple builtins.slice builtins.range
builtins.int builtins.float builtins.complex builtins.bool builtins.str builtins.bytes
builtins.object pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath
pathlib.PureWindowsPath pathlib._local.Path pathlib._local.PosixPath pathlib._local.PurePosixPath
pathlib._local.WindowsPath pathlib._local.PureWindowsPath numpy.ndarray numpy.dtype
numpy.random._pickle.__randomstate_ctor numpy.core.multiarray.scalar numpy._core.multiarray.scalar
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.StringNode
omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode
omegaconf.nodes.PathNode typing.Any typing.Union
"""
PLACEHOLDERS = frozenset(_BESIDE_TENSORS.split())
"""What checkpoints hold beside tensors: settings, paths, numbers, random states. None of it is
built: a placeholder takes its place."""
STORAGES = {
    "UntypedStorage": 1,
    **{name: dtype.itemsize for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
}
"""PyTorch's classes of storages, and the bytes of an element."""
_BUILT_BY_TORCH = {
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")),
    *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter"),
    *("torch.storage.UntypedStorage", "collections.OrderedDict", "_codecs.encode"),
    *(f"torch.{name}" for name in STORAGES),
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class Placeholder:
    """An object of a checkpoint that is no tensor: its state, and nothing that could run."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object read from a pickle, such as argparse's settings."""
    state = value.state if isinstance(value, Placeholder) else value
    return state if isinstance(state, dict) else {}


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote into `path`: tensors on the CPU in nested dictionaries.

    Raises:
        UserError: if the file is no checkpoint, is damaged, claims more than it holds, or names a
            class or function that weights do not need; nothing of it has then been executed.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        (_check_zip if mapped else _check_legacy)(path)
        with torch.serialization.safe_globals(_placeholders()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        text = str(error) or type(error).__name__
        reason = text.rpartition("WeightsUnpickler error: ")[2].splitlines()[0][:200]
        raise UserError(f"{path} is not a complete PyTorch checkpoint ({reason})") from None


def _placeholders() -> list[Any]:
    """A class for each name, which PyTorch finds by its module and name."""
    containers = {
        "defaultdict": dict,
        "AttributeDict": dict,
        "deque": list,
    }  # which the pickle fills after building them
    classes = []
    for module, _, name in (full.rpartition(".") for full in sorted(PLACEHOLDERS)):
        body: dict[str, Any] = {"__module__": module}
        if kind := containers.get(name):
            body["__new__"] = lambda cls, *arguments, kind=kind: kind()
        classes.append(type(name, (Placeholder,), body))
    return classes


# ------------------------------------------------------------------------------------ containers
def _check_zip(path: Path) -> None:
    """The layout since PyTorch 1.6: one record for the pickle, one for each storage."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size or any(
            record.compress_type != zipfile.ZIP_STORED for record in records
        ):
            raise UserError(f"{path} is a compressed archive, not what torch.save writes")
        sizes = {record.filename: record.file_size for record in records}
        pickled = [name for name in sizes if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickled) != 1:
            raise UserError(f"{path} is an archive, but not a checkpoint that torch.save wrote")
        if sizes[pickled[0]] > PICKLE_LIMIT:
            raise UserError(
                f"{path} holds {sizes[pickled[0]]:,} bytes of pickle, the limit is "
                f"{PICKLE_LIMIT:,}: save the state dict alone"
            )
        with archive.open(pickled[0]) as file:
            storages = survey(file, path)
    folder = pickled[0].removesuffix("data.pkl")
    for key, size in storages.items():
        if size > sizes.get(f"{folder}data/{key}", 0):
            raise UserError(f"{path} claims {size:,} bytes for a tensor that has fewer")


def _check_legacy(path: Path) -> None:
    """The layout before PyTorch 1.6: five pickles one after another, then the storages."""
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise UserError(
                f"{path} is neither safetensors nor a PyTorch checkpoint: is it the right file?"
            )
        pickles = io.BytesIO(b"\x80" + file.read(PICKLE_LIMIT))
    claimed = 0
    for _ in range(5):  # magic number, protocol, machine, the content, the storages' keys
        claimed += sum(survey(pickles, path).values())
    if claimed > path.stat().st_size:
        raise UserError(f"{path} claims to hold more than its size")


# ------------------------------------------------------------------------------------ the survey
def survey(file: IO[bytes], path: Path) -> dict[str, int]:
    """Check the next pickle of an open file; the bytes of each storage that it claims, by its key.

    Raises:
        UserError: as `load_pickle` does; `path` is its name in messages. Other exceptions mean that
            it is damaged.
    """
    return _Survey(file, path).storages


class _Survey(pickle._Unpickler):
    """Run the next pickle of a file with a dummy in the place of all that it names.

    The pure Python unpickler: the one in C sets memory aside for a memo of any size.

    Attributes:
        storages: the bytes that each storage claims, by its key.
        budget: what is left of the items and characters that all arguments together may have.

    Raises:
        UserError: for a name that plain data do not need, or for a pickle that would take much more
            time or memory than its length.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.storages: dict[str, int] = {}
        self.budget = PICKLE_LIMIT
        self.load()

    def find_class(self, module: str, name: str) -> Any:
        """A dummy for every known name; Python 2's names stand for those of today."""
        module, name = NAME_MAPPING.get((module, name), (module, name))
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if full not in PLACEHOLDERS and full not in _BUILT_BY_TORCH:
            export = "lightly_train.export(..., format='torch_state_dict')"
            how = export if full.startswith("lightly_train.") else "its state dict alone"
            raise UserError(
                f"{self.path} is refused: it would run or build {full[:80]!r}, which is no plain "
                f"data (nothing was executed): save {how}"
            )
        return type(name, (_Dummy,), {"survey": self})

    def persistent_load(self, pid: Any) -> _Dummy:
        """A storage: ("storage", class, key, device, number of elements, view)."""
        _, kind, key, _, count = pid[:5]
        self.check_keys(pid[2:])
        if type(count) is not int or count < 0:
            raise UserError(f"{self.path} claims a tensor of {str(count)[:20]} elements")
        key, size = str(key), STORAGES[kind.__name__] * count
        self.storages[key] = max(size, self.storages.get(key, 0))
        return self.find_class("torch", "Tensor")()

    def check_arguments(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Count what would be copied."""
        if name == "encode" and arguments[1:] != ("latin1",):
            raise UserError(f"{self.path} is refused: it holds bytes in another code than latin1")
        for value in arguments:
            if isinstance(value, (str, bytes, list, tuple, dict)):
                self.budget -= len(value)
                if name in ("set", "OrderedDict"):
                    self.check_keys(v[0] if isinstance(v, list) else v for v in value)
        if self.budget < 0:
            raise UserError(f"{self.path} is refused: it copies its content over and over")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Refuse keys whose hashes take long: tuples of tuples, integers made to collide."""
        for key in keys:
            for item in key if isinstance(key, tuple) else (key,):
                if isinstance(item, tuple) or (isinstance(item, int) and abs(item) >> 60):
                    raise UserError(f"{self.path} is refused: a key in it is too deep or too large")


class _Dummy(Placeholder):
    """Accepts whatever a pickle does to it."""

    survey: _Survey

    def __new__(cls, *arguments: Any) -> _Dummy:
        cls.survey.check_arguments(cls.__name__, arguments)
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.survey.check_arguments("", (state,))

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _check_keys_first(operator: bytes, where: slice) -> None:
    """Let an operator of the pickle check the objects on the stack that it hashes."""
    load = _Survey.dispatch[operator[0]]

    def checked(self: _Survey) -> None:
        self.check_keys(self.stack[where])
        load(self)

    _Survey.dispatch[operator[0]] = checked


_check_keys_first(pickle.SETITEM, slice(-2, -1))
for _operator in (pickle.SETITEMS, pickle.DICT):
    _check_keys_first(_operator, slice(0, None, 2))
for _operator in (pickle.ADDITEMS, pickle.FROZENSET):
    _check_keys_first(_operator, slice(None))
