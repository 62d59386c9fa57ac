"""Attention and components of a few photographs at several checkpoints of a run.

    RUN/snapshots/step_00001200.npz   maps of each photograph, some kilobytes
    RUN/snapshots/0.jpg, 1.jpg, ...   the photographs

A run keeps its newest checkpoints only, so the maps are computed while it trains, by the page that
is written at checkpoints, and stay. Shapes: h w patches, n patches of all photographs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from dino.data.images.map_overlay import overlay
from dino.features.command import save_arrays
from dino.files import UserError, atomic_write
from dino.models.attention import attention_maps
from dino.show.patch_pca import Basis, mapped
from dino.show.report.patch_maps import (
    ATTENTION_LEGEND,
    COMPONENT_LEGEND,
    patch_tokens,
    row,
)
from dino.show.report.photographs import computed, photographs
from dino.show.report.run_contents import Run
from dino.weights.load import load

MOST, SHOWN = 24, 5
"""Snapshots of a run: if there were more, every other one is deleted. So many are on the page."""


class Snapshot(NamedTuple):
    """What a checkpoint makes of each photograph.

    Attributes:
        step: of the checkpoint.
        attention: mean of the last block's heads; empty for networks without attention.
        components: the first three of all photographs, in shares of their range.
    """

    step: int
    attention: list[Float[np.ndarray, "h w"]]
    components: list[Float[np.ndarray, "h w 3"]]


def take(run: Run, checkpoint: Path) -> None:
    """Write the snapshot of a checkpoint, `RUN/checkpoints/step_N`, unless there is one.

    Raises:
        UserError: if the weights or the images cannot be read, or the features are not finite.
    """
    folder = run.folder / "snapshots"
    path = folder / f"{checkpoint.name}.npz"
    data, val = run.about.get("data"), run.about.get("val")
    if path.exists() or not isinstance(data, str):
        return
    with torch.random.fork_rng(devices=[]):  # training goes on with its own random numbers
        network = load(checkpoint)
    photos, _ = photographs(data, val, network.preprocessing.pixels)
    for number, photo in enumerate(photos):
        if not (picture := folder / f"{number}.jpg").exists():
            file = io.BytesIO()
            photo.picture.convert("RGB").save(file, "jpeg", quality=88)
            atomic_write(picture, file.getvalue())
    name = checkpoint.name
    tokens = computed({name: network}, lambda network: patch_tokens(network, photos))[name]
    basis = Basis.fit(tokens)
    arrays = {f"components{n}": basis.shares(one) for n, one in enumerate(tokens)}
    if network.heads:
        for number, photo in enumerate(photos):
            maps = attention_maps(network, photo.for_network(network))[0]
            arrays[f"attention{number}"] = maps.float().mean(dim=0).cpu().numpy()
    names = np.array([photo.name.encode("utf-8", "replace").decode() for photo in photos])
    save_arrays(path, names=names, **{key: one.astype(np.float32) for key, one in arrays.items()})
    _thin(folder)


def take_missing(run: Run) -> None:
    """The snapshots of all checkpoints of a run that are still there."""
    for state in sorted(run.folder.glob("checkpoints/step_*/state.json")):
        take(run, state.parent)


def _thin(folder: Path) -> None:
    """Delete every other snapshot if there are too many; the first and the newest stay."""
    paths = sorted(folder.glob("step_*.npz"))
    if len(paths) > MOST:
        for path in paths[1:-1:2]:
            path.unlink(missing_ok=True)


def snapshots_section(run: Run) -> str:
    """Each photograph at several checkpoints, from left to right; empty without snapshots."""
    paths = sorted((run.folder / "snapshots").glob("step_*.npz"))
    if not paths:
        return ""
    places = dict.fromkeys(round(share * (len(paths) - 1)) for share in np.linspace(0, 1, SHOWN))
    found = [_read(paths[place]) for place in places]
    names, newest = found[-1]
    shots = [one for others, one in found if others == names and _same_grids(one, newest)]
    blocks = []
    turned = [_turned(one.components, newest.components) for one in shots]
    for number, name in enumerate(names):
        with Image.open(run.folder / "snapshots" / f"{number}.jpg") as picture:
            image = picture.convert("RGB")
        attention = {
            f"step {one.step:,}": (
                overlay(image, torch.from_numpy(one.attention[number])),
                False,
            )
            for one in shots
            if one.attention
        }
        components = {
            f"step {one.step:,}": (Image.fromarray(mapped(shares[number])), True)
            for one, shares in zip(shots, turned, strict=True)
        }
        rows = ((f"{name}, attention", attention), (f"{name}, components", components))
        for title, pictures in rows:
            if pictures:
                shown = row(title, {name: (image, False), **pictures})
                blocks.append(f'<div class="block pictures steps">{shown}</div>')
    intro = (
        f"The same photographs at {len(shots)} checkpoints: attention of the CLS token (mean of "
        "the heads) and components of the patch features. Components come in the order, and with "
        "the signs, that are most like those of the newest checkpoint. Good: attention gathers on "
        "objects, and colours come apart at their outlines."
    )
    colors = (ATTENTION_LEGEND if newest.attention else "") + COMPONENT_LEGEND
    return f"<h2>While it trained</h2><p>{intro}</p>{colors}{''.join(blocks)}"


def _read(path: Path) -> tuple[list[str], Snapshot]:
    """The names of the photographs, and their maps.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            attention = [
                file[key] for n in range(len(names)) if (key := f"attention{n}") in file.files
            ]
            components = [file[f"components{n}"] for n in range(len(names))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from None
    return names, Snapshot(int(path.stem.removeprefix("step_")), attention, components)


def _same_grids(one: Snapshot, other: Snapshot) -> bool:
    return [x.shape for x in one.components] == [x.shape for x in other.components]


def _turned(
    components: Sequence[Float[np.ndarray, "h w 3"]], like: Sequence[Float[np.ndarray, "h w 3"]]
) -> list[Float[np.ndarray, "h w 3"]]:
    """Components in the order and with the signs that correlate best with others."""
    rows, others = (
        np.concatenate([one.reshape(-1, 3) for one in some]).astype(np.float64) - 0.5
        for some in (components, like)
    )
    rows, others = rows - rows.mean(axis=0), others - others.mean(axis=0)
    lengths = np.linalg.norm(rows, axis=0)[:, None] * np.linalg.norm(others, axis=0)
    alike = rows.T @ others / lengths.clip(1e-12)
    order = max(permutations(range(3)), key=lambda some: np.abs(alike[some, range(3)]).sum())
    flip = alike[order, range(3)] < 0
    return [np.where(flip, 1 - one[..., order], one[..., order]) for one in components]
