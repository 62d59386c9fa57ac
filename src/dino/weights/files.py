"""What lies on the disk: a file of weights, or the folder of another library, read safely.

A container is known by its first bytes, never by its ending.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino.files import UserError, read_json
from dino.weights.safe_pickle import load_pickle

FORMAT = 1
"""Of our own files' metadata."""
TENSOR_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which timm and transformers keep a model's tensors in its folder."""
CONFIG_LIMIT = 2**20
"""Bytes of a folder's JSON files."""


@dataclass(frozen=True)
class Container:
    """A file of weights and what its folder says about it.

    Attributes:
        path: the file with the tensors.
        content: what it holds: tensors, possibly in nested dictionaries with other values.
        metadata: a safetensors file's own texts.
        config: the folder's `config.json` (timm, transformers), empty if there is none.
        preprocessor: its `preprocessor_config.json` (transformers), empty if there is none.
    """

    path: Path
    content: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)

    def exported(self) -> dict[str, Any]:
        """What `dino export` noted in a file of another layout: spec, preprocessing, about."""
        try:
            found = json.loads(self.metadata.get("dino_export", "{}"))
        except ValueError:
            raise UserError(f"{self.path} has damaged metadata: copy it anew") from None
        return found if isinstance(found, dict) else {}


def open_container(path: Path) -> Container:
    """Read a file of weights, or the folder of a model of timm or transformers.

    Raises:
        UserError: if it is nothing of the kind, not whole, or would execute something.
    """
    path = tensor_file(path)
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        content: Any = tensors
    else:
        content, metadata = load_pickle(path), {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by their names")
    beside = path.parent if path.name in TENSOR_FILES else None
    return Container(
        path,
        content,
        metadata,
        config=_small_json(beside, "config.json"),
        preprocessor=_small_json(beside, "preprocessor_config.json"),
    )


def tensor_file(path: Path) -> Path:
    """The file with the tensors in a model's folder; a file is itself.

    Raises:
        UserError: if a folder holds none, or has its tensors in several.
    """
    if not path.is_dir():
        return path
    for name in TENSOR_FILES:
        if (path / name).exists():
            return path / name
        if (path / f"{name}.index.json").exists():
            raise UserError(f"{path} keeps its tensors in several files: save it as one first")
    raise UserError(
        f"{path} holds no teacher.safetensors, {' or '.join(TENSOR_FILES)}: is it a run that has "
        "saved, or a model's folder?"
    )


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors does: a length of 8 bytes, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; the library checks every size of the header against the file first.

    Raises:
        UserError: if the file is not whole.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            return metadata
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def own_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What `dino.weights.load.save` wrote into a file's metadata; None if it wrote nothing.

    Raises:
        UserError: if it is damaged, or of a newer format.
    """
    text = metadata.get("dino")
    if text is None:
        return None
    try:
        found = json.loads(text)
        known: dict[str, Any] = {key: found[key] for key in ("spec", "preprocessing", "about")}
        version = found["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has damaged metadata ({error!r}): copy it anew") from None
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}: a newer dino wrote it, upgrade")
    if "width" in known["spec"]:  # as 0.1.0 wrote it
        known["spec"]["embed_dim"] = known["spec"].pop("width")
    return known


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


def _small_json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).exists():
        return {}
    if (folder / name).stat().st_size > CONFIG_LIMIT:
        raise UserError(f"{folder / name} is too large for a configuration")
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not a JSON object")
    return found
