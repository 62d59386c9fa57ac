"""What took long to find out, kept in the cache folder as plain arrays (no pickle).

Nothing here raises: what cannot be read is found out anew, what cannot be written is not kept.
Whoever keeps something must be able to tell later whether it still holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dino.files import atomic_write, cache_folder


def recall(kind: str, key: str) -> dict[str, np.ndarray]:
    """The arrays kept under `key` of this kind; empty if there are none or they are damaged."""
    try:
        return load_file(_file(kind, key))
    except (OSError, SafetensorError):
        return {}


def keep(kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays in place of what was kept under `key`; several processes may do so at once."""
    with suppress(OSError):  # a full disk, or a folder that may not be written
        atomic_write(_file(kind, key), save(dict(arrays)))


def _file(kind: str, key: str) -> Path:
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / kind / f"{name}.safetensors"
