"""Seconds to find 100,000 images.

    python benchmarks/folder_start.py --where /tmp/starts

Empty files, in 1,000 folders and in one. "plain walk" is `os.walk` and a sort, which is what most
loaders do at every start; "scan" is ours, "start" opens the source. Each number is the best of
five, in one process, with the system's cache of the folders warm. `--latency 5` makes every call
that lists a folder or asks for its state wait for 5 ms, as a file server would.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

COUNT, REPEATS = 100_000, 5


def build(where: Path, folders: int) -> Path:
    root = where / f"{folders}"
    if not root.exists():
        for folder in range(folders):
            (root / f"{folder:04}").mkdir(parents=True)
            for index in range(COUNT // folders):
                (root / f"{folder:04}" / f"image-{index:06}.jpg").touch()
    return root


def slow_down(milliseconds: float) -> None:
    """Let calls to the file system wait; a listing is one call."""

    def waiting(call):  # type: ignore[no-untyped-def]
        def later(*arguments, **options):  # type: ignore[no-untyped-def]
            time.sleep(milliseconds / 1000)
            return call(*arguments, **options)

        return later

    os.scandir, os.stat = waiting(os.scandir), waiting(os.stat)  # type: ignore[assignment]


def best(function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", type=Path, required=True, help="an empty folder")
    parser.add_argument("--latency", type=float, default=0, help="ms that each call waits")
    given = parser.parse_args()
    from dino.data.sources.folder import image_names
    from dino.data.sources.open import Folder

    roots = {folders: build(given.where, folders) for folders in (1000, 1)}
    if given.latency:
        slow_down(given.latency)
    waits = f", calls wait {given.latency:g} ms" if given.latency else ""
    table = Table(title=f"{COUNT:,} images, seconds, best of {REPEATS}{waits}")
    for name in ("folders", "plain walk", "scan", "start"):
        table.add_column(name, justify="right")
    for folders, root in roots.items():

        def plain(root: Path = root) -> None:
            names = [
                f"{folder}/{name}"
                for folder, _, files in os.walk(root)
                for name in files
                if name.endswith(".jpg")
            ]
            assert len(sorted(names)) == COUNT

        row = [best(plain)]
        row.append(best(lambda root=root: image_names(root)))  # type: ignore[misc]
        row.append(best(lambda root=root: Folder(root)))  # type: ignore[misc]
        table.add_row(f"{folders:,}", *(f"{seconds:.3f}" for seconds in row))
    Console().print(table)


if __name__ == "__main__":
    main()
