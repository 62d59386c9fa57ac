"""Memory of the workers of a loader over a million images, and the start of each epoch.

    python benchmarks/loader_memory.py --where /tmp/million

Made once below `--where`: 1,000 folders of 1,000 hard links to 20 small JPEGs, and 1,000 hard links
to one shard of 1,000 of them. Each source is measured in a process of its own: `folder` and
`shards` as `dino pretrain` opens them, and `list`, the folder's paths in a Python list of strings,
as many data sets have them. For each: seconds to open it the first and the second time; resident
(RSS) and private (USS) memory of the workers, in the mean, after 1,000 and after 100,000 images;
the wait for the very first batch, and the longest wait around the start of the second epoch beside
the median wait. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

SIDE, FOLDERS, PER_FOLDER, PICTURES = 32, 1000, 1000, 20
BATCH = 50


def build(where: Path) -> None:
    if (where / "done").exists():
        return
    (where / "pictures").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES, SIDE, SIDE, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(where / "pictures" / f"{index}.jpg")
    for folder in range(FOLDERS):
        (where / "folder" / f"{folder:03}").mkdir(parents=True)
        for index in range(PER_FOLDER):
            # Not one file for all: file systems limit the links to one.
            source = where / "pictures" / f"{(folder + index) % PICTURES}.jpg"
            os.link(source, where / "folder" / f"{folder:03}" / f"image-{index:06}.jpg")
    (where / "shards").mkdir()
    with tarfile.open(where / "shards" / "000.tar", "w") as archive:
        for index in range(PER_FOLDER):
            content = (where / "pictures" / f"{index % PICTURES}.jpg").read_bytes()
            about = tarfile.TarInfo(f"image-{index:06}.jpg")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    for shard in range(1, FOLDERS):
        os.link(where / "shards" / "000.tar", where / "shards" / f"{shard:03}.tar")
    (where / "done").touch()


class PythonList:
    """What a data set with a list of strings costs."""

    labels = classes = None

    def __init__(self, folder) -> None:  # type: ignore[no-untyped-def]
        self.paths = [folder.path(index) for index in range(len(folder))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        from dino.data.images.decode import read_image

        return read_image(self.paths[index])

    def path(self, index: int) -> str:
        return self.paths[index]


def memory() -> tuple[float, float]:
    """RSS and USS of the workers in MiB, in the mean."""
    rows = []
    for worker in multiprocessing.active_children():
        lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        rows.append((kib["Rss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024))
    return statistics.mean(row[0] for row in rows), statistics.mean(row[1] for row in rows)


def measure(who: str, where: Path, workers: int) -> dict[str, object]:
    import torch

    from dino.data.loader import PretrainLoader
    from dino.data.sampler import EpochSampler
    from dino.data.sources.open import open_source
    from dino.data.views.view_spec import ViewSettings

    torch.set_num_threads(1)
    name = where / "folder" if who != "shards" else where / "shards" / "{000..999}.tar"
    opened = []
    for _ in range(2):
        started = time.perf_counter()
        source = open_source(name)
        opened.append(time.perf_counter() - started)
    if who == "list":
        source = open_source(PythonList(source))
    blocks = source.blocks
    specs = ViewSettings(global_size=16, local_count=0).specs()

    def loader(start: int):  # type: ignore[no-untyped-def]
        sampler = EpochSampler(len(source), BATCH, start_step=start, blocks=blocks)
        return iter(PretrainLoader(source, specs, sampler, seed=0, workers=workers))

    batches, waits, sizes = loader(0), [], {}
    for step in range(1, 100_000 // BATCH + 1):
        started = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - started)
        if step * BATCH in (1_000, 100_000):
            sizes[step * BATCH] = memory()
    del batches
    margin = 100
    batches, around = loader(len(source) // BATCH - margin), []
    for _ in range(2 * margin):
        started = time.perf_counter()
        batch = next(batches)
        around.append(time.perf_counter() - started)
    assert batch.epoch == 1
    return {
        "images": len(source),
        "opened": opened,
        "sizes": sizes,
        "first": waits[0],
        "median": statistics.median(waits),
        "second": max(around[margin - 4 * workers :]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", type=Path, required=True, help="an empty folder, for 1 M names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", choices=["folder", "shards", "list"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.where, given.workers)))
        return
    build(given.where)
    table = Table(title=f"{FOLDERS * PER_FOLDER:,} images, {given.workers} workers")
    for name in ("source", "opened s", "again s", "RSS MiB 1k", "RSS 100k", "USS 1k", "USS 100k"):
        table.add_column(name, justify="right")
    for name in ("first batch s", "median wait ms", "2nd epoch, longest wait ms"):
        table.add_column(name, justify="right")
    environment = {**os.environ, "DINO_CACHE": str(given.where / "cache")}
    for who in ("list", "folder", "shards"):
        words = [sys.executable, __file__, "--where", str(given.where), "--one", who]
        words += ["--workers", str(given.workers)]
        done = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=3600
        )
        row = json.loads(done.stdout.splitlines()[-1])
        (rss, uss), (rss_later, uss_later) = row["sizes"].values()
        table.add_row(
            who,
            *(f"{seconds:.2f}" for seconds in row["opened"]),
            *(f"{size:.0f}" for size in (rss, rss_later, uss, uss_later)),
            f"{row['first']:.2f}",
            *(f"{1000 * row[key]:.0f}" for key in ("median", "second")),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
