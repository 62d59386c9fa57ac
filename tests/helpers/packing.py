"""Folders and shards of the same small pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")


def pictures(root: Path, count: int = 14) -> Path:
    """A folder of classes, each picture of a size and content of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        path = root / CLASSES[index * len(CLASSES) // count] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[: 20 + index, : 40 - index]).save(path)
    return root


def samples(root: Path) -> list[tuple[str, bytes, str]]:
    """Name in the folder, bytes and class of each picture, in the order of the folder."""
    paths = sorted(root.rglob("*.png"))
    return [(str(p.relative_to(root)), p.read_bytes(), p.parent.name) for p in paths]


def tar(
    path: Path | str, files: Iterable[tuple[str, bytes]], kind: int = tarfile.DEFAULT_FORMAT
) -> bytes:
    """Write an archive, unless `path` is empty, and give its bytes."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
        for name, content in files:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    if path:
        Path(path).write_bytes(target.getvalue())
    return target.getvalue()


def members(items: Sequence[tuple[str, bytes, str]], label: str = "") -> list[tuple[str, bytes]]:
    """The members of a shard: an image each, and what its label stands in."""
    found = []
    for name, content, of_class in items:
        found.append((name, content))
        key, number = name.rpartition(".")[0], CLASSES.index(of_class)
        if label == "cls":
            found.append((f"{key}.cls", f"{number}\n".encode()))
        elif label == "txt":
            found.append((f"{key}.txt", of_class.encode()))
        elif label == "json":
            found.append((f"{key}.json", json.dumps({"label": of_class, "id": 7}).encode()))
    return found


def shards(folder: Path, root: Path, count: int, label: str = "") -> str:
    """The pictures of `root` in `count` shards, in the order of the folder; how to call them."""
    folder.mkdir(exist_ok=True)
    items = samples(root)
    for number, part in enumerate(np.array_split(np.arange(len(items)), count)):
        tar(folder / f"part-{number:03}.tar", members([items[i] for i in part], label))
    return f"{folder}/part-{{000..{count - 1:03}}}.tar"
