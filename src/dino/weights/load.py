"""Load and save networks: strictly, never as a pickle; the file states the architecture.

A file of dino is safetensors with one metadata entry, `dino`: JSON with the architecture (`spec`,
the arguments of `dino.create`), the preprocessing that belongs to the weights, and the writer's
description (`about`: recipe, step, data). Files of other libraries are translated (`key_maps`) and
loaded just as strictly.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError, as_path, disk_errors, naming, replacing
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.models.position_embedding import Position
from dino.settings import Range, conform
from dino.weights.adapt import adapt_state_dict, for_channels
from dino.weights.checkpoint import Checkpoint, read
from dino.weights.download import fetch
from dino.weights.files import FORMAT, open_container, shown, state_dict
from dino.weights.published import CATALOGUE, Published, advice

LOGGER = logging.getLogger("dino")


def save(backbone: Backbone, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Write `backbone` to `path` (safetensors), completely or not at all.

    `about` describes the weights in JSON values, for provenance and model cards.
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
    network: str = "teacher",
    position: Position | None = None,
    channels: int | None = None,
    heads: int | None = None,
) -> Backbone:
    """A trained network in evaluation mode, with the transform that belongs to its weights.

    Args:
        weights: a run folder or one of its checkpoints; a file of dino; an official `.pth`,
            backbone only or full checkpoint, of DINO, DINOv2, DINOv3 and relatives; a file or
            folder of timm or transformers; a checkpoint of another trainer that holds such a
            network; or a published name such as `dino_vits16`, which is downloaded once (`dino
            weights list`).
        device: where to put it.
        network: the teacher, which every result of the paper is of, or the student, where the
            checkpoint has both; or a key of the file under which a network lies (`model_ema`).
        position: how a ViT resamples its position embedding to other image sizes
            (`models.position_embedding`). By default as in the library that the file comes from, so
            that features agree: `reference` for official files, `exact` for those of transformers,
            `antialias` for timm's and for DINOv2's networks with registers.
        channels: adapt the first layer to images of so many channels instead of RGB
            (`adapt.inflate`): a picture with all channels equal gives the feature of the grey RGB
            picture. Mean and deviation of the preprocessing are repeated likewise, values are
            taken at their type's full range.
        heads: attention heads of a ViT whose file does not state them.

    What is assumed because a file does not state it (`Checkpoint.warnings`) is logged.

    Raises:
        UserError: if there is nothing of the kind, it would execute something, or keys or shapes
            do not fit, naming them.
    """
    conform(position, Position | None, "position")
    channels = conform(channels, Annotated[int, Range(low=1)] | None, "channels")
    heads = conform(heads, Annotated[int, Range(low=1)] | None, "heads")
    path, published = _locate(weights)
    published_heads = None if published is None else published.heads
    newest = path / "teacher.safetensors"  # of a run, beside its checkpoints
    if network == "teacher" and newest.exists() and not (path / "state.json").exists():
        path = newest
    with naming(path):
        checkpoint = read(path, heads or published_heads, network)
    spec = {**checkpoint.spec, **({"position": position} if position else {})}
    with torch.device("meta"):  # what does not fit is refused before it costs memory
        empty = create(**checkpoint.spec)
    if position and empty.position is None:
        raise UserError(f"{spec['arch']} has no position embedding: leave out position=")
    tensors = checkpoint.network(network).backbone
    check_state_dict(empty, tensors, checkpoint.path)
    for warning in checkpoint.warnings:
        LOGGER.warning("%s: %s", weights, warning)
    backbone = create(**spec)
    stated = None if published is None else published.preprocessing
    backbone.preprocessing = stated or checkpoint.preprocessing
    load_strictly(backbone, tensors, checkpoint.path)
    if channels is not None and channels != spec.get("channels", 3):
        adapted = create(**{**spec, "channels": channels})
        tensors = adapt_state_dict(backbone.state_dict(), adapted, backbone.position or "reference")
        load_strictly(adapted, tensors, checkpoint.path)
        adapted.preprocessing = for_channels(backbone.preprocessing, channels)
        backbone = adapted
    backbone.origin = checkpoint.origin(network)
    backbone.loaded = ", ".join([str(weights), *checkpoint.describe(network)])
    try:
        return backbone.to(torch.device(device)).eval()
    except (AssertionError, RuntimeError, TypeError) as error:  # unknown, absent or full
        reason = str(error).splitlines()[0]
        raise UserError(f"the network cannot be moved to device {device!r}: {reason}") from None


def read_checkpoint(
    weights: str | Path, *, heads: int | None = None, network: str = "teacher"
) -> Checkpoint:
    """All that a checkpoint holds, under dino's names: student, teacher, heads, center.

    The arguments are those of `load`; a run folder gives its last checkpoint.

    Raises:
        UserError: as `load` does, except for keys and shapes, which are not compared.
    """
    path, published = _locate(weights)
    if published is None:
        return read(path, heads, network)
    checkpoint = read(path, heads or published.heads, network)
    stated = published.preprocessing or checkpoint.preprocessing
    return replace(checkpoint, preprocessing=stated)


class LinearClassifier(NamedTuple):
    """A linear classifier on frozen features.

    Attributes:
        weight: the published files of ViT-S are for the CLS tokens of the last four blocks,
            joined, those of ViT-B for the CLS token of the last block and the mean of its patch
            tokens. The published code joins the latter block by block: [cls_0, avg_0, cls_1, ...].
        bias: one number a class.
    """

    weight: Float[Tensor, "classes D"]
    bias: Float[Tensor, " classes"]


def read_linear(weights: str | Path) -> LinearClassifier:
    """Read any single linear layer from a file or a published name such as `dino_vits16_linear`.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    path, _ = _locate(weights)
    content = open_container(path).content
    tensors = state_dict(content.get("state_dict", content), path)
    layer = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    if len(tensors) == 2 and layer.keys() == {"weight", "bias"}:
        found = LinearClassifier(layer["weight"].float(), layer["bias"].float())
        if found.weight.ndim == 2 and found.bias.shape == found.weight.shape[:1]:
            return found
    raise UserError(f"{path} is no linear classifier: it should hold one weight and one bias")


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


def mismatches(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Why `tensors` are not the state of `module`: missing, unexpected, other shapes."""
    expected = module.state_dict()
    found = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": [shown(name) for name in sorted(tensors.keys() - expected.keys())],
        "other shapes:": [
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & tensors.keys())
            if expected[name].shape != tensors[name].shape
        ],
    }
    return {kind: names for kind, names in found.items() if names}


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copy `tensors` into `module`; raises as `check_state_dict` does."""
    check_state_dict(module, tensors, origin)
    module.load_state_dict(tensors, strict=True)


def check_state_dict(module: torch.nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Check that every key and shape of `tensors` and of `module` agree.

    Raises:
        UserError: naming missing, unexpected and mis-shaped keys.
    """
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in mismatches(module, tensors).items()
    ]
    if problems:
        raise UserError(f"the weights in {origin} do not fit the network: {'; '.join(problems)}")


# ------------------------------------------------------------------------------------ details
def _locate(weights: str | Path) -> tuple[Path, Published | None]:
    """A path, or the file of a published name and what is known of it that no file states."""
    path, published = as_path(weights, "weights"), CATALOGUE.get(str(weights))
    if path.exists():
        return path, None
    if published is not None:
        return fetch(published), published
    raise UserError(f"there are no weights at {path}: {advice(str(weights))}")
