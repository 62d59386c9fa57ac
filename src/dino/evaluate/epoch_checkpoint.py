"""The state of a classifier's training after an epoch, from which a stopped training continues."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError, replacing
from dino.runtime import barrier, gather_objects, ranks
from dino.weights.files import read_safetensors


class EpochCheckpoint:
    """The newest state of a training that has not ended.

    Args:
        path: the file, on a disk that all ranks share; the state of another training is ignored.
        key: everything that the training depends on, as JSON takes it.

    Attributes:
        epochs: that the file holds.
    """

    def __init__(self, path: Path, key: Any) -> None:
        self.path = path
        self.epochs = 0
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def read(self) -> tuple[dict[str, Tensor], list[Any]]:
        """The newest tensors and history; empty if there are none.

        Raises:
            UserError: if only some ranks see the file.
        """
        found: tuple[dict[str, Tensor], list[Any]] = {}, []
        if self.path.exists():
            tensors, about = read_safetensors(self.path)
            if about["key"] == self.key:
                found = tensors, json.loads(about["history"])
        if len({*gather_objects(len(found[1]))}) > 1:
            raise UserError(f"not all processes see {self.path}: choose --out on a shared disk")
        self.epochs = len(found[1])
        return found

    def write(self, tensors: dict[str, Tensor], history: list[Any]) -> None:
        """Write the tensors, and a history of one entry an epoch, atomically."""
        if ranks().main:
            about = {"key": self.key, "history": json.dumps(history)}
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with replacing(self.path) as temporary:
                save_file(on_host, temporary, metadata=about)
        barrier()
        self.epochs = len(history)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C, which stops at once, say from where the same command continues."""
        try:
            yield
        except KeyboardInterrupt:
            if ranks().main and self.epochs:
                message = f"stopped: the same command continues after epoch {self.epochs}"
                print(f"\n{message}", file=sys.stderr)
            raise

    def delete(self) -> None:
        """Delete the file: the training is finished."""
        if ranks().main:
            self.path.unlink(missing_ok=True)
