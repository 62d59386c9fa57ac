"""Weights in and out of files: strict, never a pickle, and the network is built from the file.

A file of ours is safetensors with one metadata entry, `dino`: JSON with the architecture
(`spec`, the arguments of `dino.create`), the preprocessing that belongs to the weights, and what
the writer says about them (`about`: recipe, step, data).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino.data.decode import Preprocessing
from dino.files import UserError, replacing
from dino.models.create import create
from dino.models.features import Backbone

FORMAT = 1


def save(backbone: Backbone, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Write `backbone` to `path` (safetensors), whole or not at all.

    Args:
        backbone: the network; on any device.
        path: file to write.
        about: JSON-able words on these weights, for provenance and model cards.
    """
    metadata = {
        "format": FORMAT,
        "spec": backbone.spec,
        "preprocessing": backbone.preprocessing.to_dict(),
        "about": about or {},
    }
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"dino": json.dumps(metadata)})


def load(weights: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """A trained network in evaluation mode.

    Args:
        weights: a run folder (its teacher), or a file of weights that `save` wrote.
        device: where to put it.

    Raises:
        UserError: if there is nothing of the kind, or keys or shapes do not fit, naming them.
    """
    path = _locate(weights)
    tensors, metadata = read(path)
    backbone = create(**metadata["spec"])
    backbone.preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    load_strictly(backbone, tensors, path)
    return backbone.to(device).eval()


def untrained_like(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture on the same device with fresh weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = create(**backbone.spec)
    fresh.preprocessing = backbone.preprocessing
    return fresh.to(next(backbone.parameters()).device).eval()


def fingerprint(backbone: Backbone) -> str:
    """SHA-256 of all weights by name and value, whatever file or device they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `save` wrote.

    Raises:
        UserError: if it is another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("dino")
            if text is None:
                raise UserError(
                    f"{path} was not written by dino: it does not name its architecture"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(text)  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copy `tensors` into `module`; every key and shape must agree.

    Raises:
        UserError: naming missing, unexpected and mis-shaped keys.
    """
    own = module.state_dict()
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", sorted(own.keys() - tensors.keys())),
            ("unexpected", sorted(tensors.keys() - own.keys())),
            ("other shapes:", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights in {origin} do not fit the network: {'; '.join(problems)}")
    module.load_state_dict(tensors, strict=True)


def _locate(weights: str | Path) -> Path:
    path = Path(weights)
    if path.is_dir():
        if not (path / "teacher.safetensors").exists():
            raise UserError(f"{path} holds no teacher.safetensors: is it a run that has saved?")
        return path / "teacher.safetensors"
    if not path.exists():
        raise UserError(f"there are no weights at {path}: give a run folder or a file of weights")
    return path
