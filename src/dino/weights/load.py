"""Weights in and out of files: strict, never a pickle, and the network is built from the file.

A file of ours is safetensors with one metadata entry, `dino`: JSON with the architecture
(`spec`, the arguments of `dino.create`), the preprocessing that belongs to the weights, and what
the writer says about them (`about`: recipe, step, data). Files of other libraries are translated
(`dialects`) and loaded just as strictly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError, as_path, disk_errors, naming, replacing
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.models.position_embedding import Position
from dino.weights.adapt import fitted
from dino.weights.checkpoint import Part, Parts, WhichNetwork, read_parts
from dino.weights.download import fetch
from dino.weights.files import FORMAT, open_container
from dino.weights.infer_spec import spread
from dino.weights.published import CATALOGUE

__all__ = [
    "LinearClassifier",
    "Part",
    "Parts",
    "fingerprint",
    "load",
    "load_strictly",
    "misfits",
    "read_checkpoint",
    "read_linear",
    "save",
    "untrained_like",
]


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


@disk_errors()
def load(
    weights: str | Path,
    device: str | torch.device = "cpu",
    *,
    network: WhichNetwork = "teacher",
    position: Position | None = None,
    channels: int | None = None,
    heads: int | None = None,
) -> Backbone:
    """A trained network in evaluation mode, with the transform that belongs to its weights.

    Args:
        weights: a run folder or one of its checkpoints; a file of ours; an official `.pth`,
            backbone only or full checkpoint; a file or folder of timm or transformers; or a
            published name such as `dino_vits16`, which is downloaded once (`dino weights list`).
        device: where to put it.
        network: the teacher, which every result of the paper is of, or the student, where the
            checkpoint has both.
        position: how a ViT resamples its position embedding to other image sizes than its own
            (`models.position`). By default as the place does that the file comes from, so that
            features agree there and here: official files `reference`, those of transformers
            `exact`; timm's `exact` too, although timm also antialiases, so that it agrees at the
            network's own size only. Our own files say it themselves.
        channels: adapt the first layer to images of so many channels instead of RGB. Its weights
            are repeated channel by channel, cyclically, and scaled so that their sum over the
            channels stays what it was (for one channel it is that sum): a picture with all
            channels equal then gives the feature of the grey RGB picture. Mean and deviation of
            the preprocessing are repeated likewise, values are taken at their type's full range.
        heads: attention heads of a ViT whose file does not tell, needed at other widths than 192,
            384, 768 and 1024.

    Raises:
        UserError: if there is nothing of the kind, it would execute something, or keys or shapes
            do not fit, naming them.
    """
    as_path(weights, "weights")
    for name, choice, known in (
        ("network", network, get_args(WhichNetwork)),
        ("position", position, (*get_args(Position), None)),
    ):
        if choice not in known:
            raise UserError(f"{name} must be one of {', '.join(map(str, known))}, not {choice!r}")
    for name, number in (("channels", channels), ("heads", heads)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{name} must be a positive whole number, not {number!r}")
    path = _locate(weights)
    if network == "teacher" and path.is_dir() and (path / "teacher.safetensors").exists():
        path = _newest_teacher(path)
    with naming(path):
        parts = read_parts(path, heads)
    spec = dict(parts.spec)
    tensors = parts.network(network).backbone
    with torch.device("meta"):  # what does not fit is refused before it costs memory
        empty = create(**spec)
    refuse_misfits(empty, tensors, parts.path)
    if position is not None:
        if empty.position is None:
            raise UserError(f"{spec['arch']} has no position embedding: leave out position=")
        spec["position"] = position
    backbone = create(**spec)
    backbone.preprocessing = parts.preprocessing
    load_strictly(backbone, tensors, parts.path)
    if channels is not None and channels != spec.get("channels", 3):
        backbone = _with_channels(backbone, channels)
    backbone.origin = parts.origin(network)
    try:
        return backbone.to(torch.device(device)).eval()
    except (AssertionError, RuntimeError, TypeError) as error:  # unknown, absent or full
        reason = str(error).splitlines()[0]
        raise UserError(f"the network cannot be moved to device {device!r}: {reason}") from None


def read_checkpoint(weights: str | Path, *, heads: int | None = None) -> Parts:
    """All that a checkpoint holds, under our names: student, teacher, heads, center.

    Args:
        weights: as for `load`. A run folder gives its last checkpoint.
        heads: as for `load`.

    Raises:
        UserError: as `load` does, but for keys and shapes, which are checked where the tensors go.
    """
    return read_parts(_locate(weights), heads)


class LinearClassifier(NamedTuple):
    """A linear classifier on frozen features.

    Attributes:
        weight: the published files of ViT-S belong to the CLS tokens of the last four blocks,
            joined, those of ViT-B to the CLS token of the last block and the mean of its patch
            tokens. The published code joins the latter block by block: [cls_0, avg_0, cls_1, ...].
        bias: one number a class.
    """

    weight: Float[Tensor, "classes D"]
    bias: Float[Tensor, " classes"]


def read_linear(weights: str | Path) -> LinearClassifier:
    """Weight and bias of a linear classifier: the published files, or any single linear layer.

    Args:
        weights: a file, or a published name such as `dino_vits16_linear`.

    Raises:
        UserError: if the file is another kind of file.
    """
    path = _locate(weights)
    content = open_container(path).content
    inner = content.get("state_dict", content)
    tensors = inner if isinstance(inner, dict) else {}
    by_end = {str(name).rpartition(".")[2]: value for name, value in tensors.items()}
    weight, bias = by_end.get("weight"), by_end.get("bias")
    if (
        not isinstance(weight, Tensor)
        or not isinstance(bias, Tensor)
        or len(tensors) != 2
        or weight.ndim != 2
        or bias.shape != weight.shape[:1]
    ):
        raise UserError(f"{path} is no linear classifier: it should hold one weight and one bias")
    return LinearClassifier(weight.detach(), bias.detach())


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


def misfits(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps `tensors` from being the state of `module`: missing, unexpected, other shapes."""
    own = module.state_dict()
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    found = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "other shapes:": shapes,
    }
    return {kind: names for kind, names in found.items() if names}


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copy `tensors` into `module`; every key and shape must agree.

    Raises:
        UserError: naming missing, unexpected and mis-shaped keys.
    """
    refuse_misfits(module, tensors, origin)
    module.load_state_dict(tensors, strict=True)


def refuse_misfits(module: torch.nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Nothing, if `tensors` are the state of `module` to the last key and shape.

    Raises:
        UserError: naming missing, unexpected and mis-shaped keys.
    """
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in misfits(module, tensors).items()
    ]
    if problems:
        raise UserError(f"the weights in {origin} do not fit the network: {'; '.join(problems)}")


# ------------------------------------------------------------------------------------ details
def _locate(weights: str | Path) -> Path:
    """The path that is meant: itself, or a published name's file after its download."""
    path = Path(weights)
    if path.exists():
        return path
    if str(weights) in CATALOGUE:
        return fetch(CATALOGUE[str(weights)])
    raise UserError(
        f"there are no weights at {path}: give a run folder, a file of weights or a name that "
        "`dino weights list` shows"
    )


def _newest_teacher(run: Path) -> Path:
    """A run's teacher stands alone in a file; a checkpoint's beside the student."""
    return run if (run / "state.json").exists() else run / "teacher.safetensors"


def _with_channels(backbone: Backbone, channels: int) -> Backbone:
    """The same network for images of `channels` channels."""
    adapted = create(**{**backbone.spec, "channels": channels})
    tensors = fitted(backbone.state_dict(), adapted, backbone.position or "reference")
    load_strictly(adapted, tensors, Path(str(backbone.spec["arch"])))
    given = backbone.preprocessing
    adapted.preprocessing = replace(
        given,
        mean=spread(given.mean, channels),
        std=spread(given.std, channels),
        pixels=replace(given.pixels, channels=channels, low=None, high=None),
    )
    return adapted
