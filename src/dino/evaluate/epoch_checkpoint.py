"""A training that was stopped goes on where it was: its state after an epoch, in one file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError, replacing
from dino.runtime import barrier, gather_objects, ranks


class Unfinished:
    """The state of a training that has not ended.

    Args:
        path: the file, on a disk that all ranks share; what another training left there is not
            taken.
        about: everything that the training depends on, as JSON takes it.
    """

    def __init__(self, path: Path, about: Any) -> None:
        self.path = path
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def read(self) -> tuple[dict[str, Tensor], list[Any]]:
        """The tensors and the history that were kept last; empty if there are none.

        Raises:
            UserError: if only some ranks find them.
        """
        found = self._read() if self.path.exists() else ({}, [])
        if len({*gather_objects(len(found[1]))}) > 1:
            raise UserError(f"not all processes see {self.path}: choose --out on a shared disk")
        return found

    def _read(self) -> tuple[dict[str, Tensor], list[Any]]:
        with safe_open(self.path, "pt") as file:
            words = file.metadata()
            if words["key"] != self.key:
                return {}, []
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(words["history"])

    def keep(self, tensors: dict[str, Tensor], history: list[Any]) -> None:
        """Write tensors, and one entry of the history an epoch, whole or not at all."""
        if ranks().main:
            words = {"key": self.key, "history": json.dumps(history)}
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with replacing(self.path) as temporary:
                save_file(on_host, temporary, metadata=words)
        barrier()

    def forget(self) -> None:
        """The training is finished."""
        if ranks().main:
            self.path.unlink(missing_ok=True)
