"""Files of weights and the folders of other libraries, read safely.

The kind of a file is known by its first bytes, never by its ending.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.weights.safe_pickle import load_pickle

FORMAT = 1
"""Version of the metadata in dino's files."""
TENSOR_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which timm and transformers write a model's tensors in its folder."""
INDEX_FILES = tuple(f"{name}.index.json" for name in TENSOR_FILES)
"""Names of the list of files that hold the tensors of a model that is in several."""
CONFIG_LIMIT = 2**20
"""Bytes of a folder's JSON files."""
HEADER_LIMIT = 8 * 2**20
"""Bytes of the header of a safetensors file, some 100,000 tensors."""


@dataclass(frozen=True)
class Container:
    """A file of weights and what its folder says about it.

    Attributes:
        path: the file with the tensors.
        content: tensors, possibly in nested dictionaries with other values.
        metadata: the texts in a safetensors file.
        config: the folder's `config.json` (timm, transformers), empty if there is none.
        preprocessor: its `preprocessor_config.json` (transformers), empty if there is none.
        exported: see `export_metadata`.
    """

    path: Path
    content: dict[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    exported: dict[str, Any]


def open_container(path: Path) -> Container:
    """Read a file of weights, or the folder of a model of timm or transformers.

    Raises:
        UserError: if it is nothing of the kind, damaged, or would execute something.
    """
    path = tensor_file(path)
    content: Any
    metadata: dict[str, str]
    content, metadata = _read_shards(path) if path.name in INDEX_FILES else _read_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by their names")
    folder = path.parent if path.name in (*TENSOR_FILES, *INDEX_FILES) else None
    return Container(
        path,
        content,
        metadata,
        config=_small_json(folder, "config.json"),
        preprocessor=_small_json(folder, "preprocessor_config.json"),
        exported=export_metadata(metadata, path),
    )


def _read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    return read_safetensors(path) if is_safetensors(path) else (load_pickle(path), {})


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model in several files, all of which `index` names, and no other.

    Raises:
        UserError: if a file or a tensor is missing, or lies where the index does not say.
    """
    place = _small_json(index.parent, index.name).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(name, str) for name in place.values()):
        raise UserError(f"{index} names no files of tensors (weight_map)")
    tensors: dict[str, Tensor] = {}
    for path in _shards(index):
        if not path.exists():
            raise UserError(f"{path} is missing, which {index.name} names: copy all files")
        found, _ = _read_tensors(path)
        stated = {name for name, file in place.items() if file == path.name}
        if not isinstance(found, dict) or found.keys() != stated:
            odd = sorted(map(str, set(found) ^ stated))[:3]
            raise UserError(
                f"{path} does not hold the tensors that {index.name} states ({', '.join(odd)}): "
                "copy all files of one model"
            )
        tensors |= found
    return tensors, {}


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_small_json(index.parent, index.name).get("weight_map", {}).values()))
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} names files outside its folder")
    return [index.parent / name for name in names]


def tensor_file(path: Path) -> Path:
    """The file with the tensors in a model's folder, or the index of several; a file is itself.

    Raises:
        UserError: if a folder holds none or several, or if it is no regular file.
    """
    if not path.is_dir():
        return regular_file(path)
    for name in TENSOR_FILES:
        if (path / name).exists():
            return regular_file(path / name)
        if (path / f"{name}.index.json").exists():
            return regular_file(path / f"{name}.index.json")
    if (path / ".metadata").exists():
        raise UserError(
            f"{path} is a distributed checkpoint (torch.distributed.checkpoint), whose list of "
            "tensors is a pickle: join it first with `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth`"
        )
    raise UserError(
        f"{path} holds no teacher.safetensors, {' or '.join(TENSOR_FILES)}: is it a run that has "
        "saved, or a model's folder?"
    )


def regular_file(path: Path) -> Path:
    """`path`, if it is a file that ends: pipes and devices may not.

    Raises:
        UserError: if it is none.
    """
    if not path.is_file():
        raise UserError(f"{path} is no regular file: give a file or folder of weights")
    return path


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors does: a length of 8 bytes, then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; the library checks every size of the header against the file first.

    Raises:
        UserError: if the file is damaged or its header is longer than `HEADER_LIMIT`.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; see `read_safetensors`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with regular_file(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if HEADER_LIMIT < length < path.stat().st_size:  # else the library finds it damaged
        raise UserError(f"{path} has a header of {length:,} bytes, the limit is {HEADER_LIMIT:,}")
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from None


def dino_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What `dino.weights.load.save` writes: spec, preprocessing, about; None if there is nothing.

    Raises:
        UserError: if it is damaged, or of a newer format.
    """
    if "dino" not in metadata:
        return None
    try:
        found = json.loads(metadata["dino"])
        known: dict[str, Any] = {key: found[key] for key in ("spec", "preprocessing")}
        known["about"] = dict(found["about"])
        version = found["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has damaged metadata ({error!r}): copy it again") from None
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}: a newer dino wrote it, upgrade")
    if "width" in known["spec"]:  # as 0.1.0 wrote it
        known["spec"]["embed_dim"] = known["spec"].pop("width")
    return {**known, "preprocessing": Preprocessing.from_dict(known["preprocessing"])}


def export_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The metadata of `dino export`: spec, preprocessing, about; empty if there is none.

    Raises:
        UserError: if it is damaged.
    """
    try:
        found = dict(json.loads(metadata.get("dino_export", "{}")))
        return found | ({"about": dict(found["about"])} if "about" in found else {})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has damaged metadata ({error!r}): copy it again") from None


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """`content`, if it is tensors by their names and nothing else.

    Raises:
        UserError: if it is not, or if a tensor claims more elements than the file holds.
    """
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds other things than tensors ({shown(name)}): is it a checkpoint?"
            )
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UserError(f"{path} claims more elements of {shown(name)} than it holds")
    return {name: tensor.detach() for name, tensor in content.items()}


def shown(name: object) -> str:
    """A name from a file for a message: on one line, of at most 80 characters."""
    text = str(name)[:80] if isinstance(name, str) else f"a key that is a {type(name).__name__}"
    return text if text.isprintable() else ascii(text)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of an index of several files that of their hashes."""
    if path.name in INDEX_FILES:
        hashes = "".join(file_hash(shard) for shard in _shards(path))
        return hashlib.sha256(hashes.encode()).hexdigest()
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _small_json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).exists():
        return {}
    if regular_file(folder / name).stat().st_size > CONFIG_LIMIT:
        raise UserError(f"{folder / name} is too large for a configuration")
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not a JSON object")
    return found
