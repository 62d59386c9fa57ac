"""The jobs on many vectors with planted answers: what they find, how long they take, their memory.

    python benchmarks/jobs.py --job search --images 1000000

Vectors are random directions of `embed-dim` numbers, in a file that is mapped. Planted are copies
(cosine 0.95) for `search` and `duplicates`, groups for `cluster` and `select`, and patches unlike
all others for `anomalies`. The result is one line. Peak memory is that of the process, mapped pages
of the file included, which the system takes back where it needs them.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from dino.features.near_duplicates import groups
from dino.features.search import nearest
from dino.jobs.anomalies import distances
from dino.jobs.cluster import agreement, cluster
from dino.jobs.distance import KERNEL_IMAGES, divided, frechet_distance, kernel_distance
from dino.jobs.select import select
from dino.settings import Range

BLOCK = 2**16
PLANTED, GROUPS, COSINE = 1000, 20, 0.95

Job = Literal["search", "duplicates", "cluster", "select", "anomalies", "distance"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure one job on vectors with planted answers."""

    job: Job
    """Which job."""
    images: Annotated[int, Range(low=10_000)] = 1_000_000
    """How many vectors."""
    embed_dim: Annotated[int, Range(low=32)] = 384
    """Numbers of a vector."""


def near(rows: Tensor, seed: int) -> Tensor:
    """Directions at the cosine `COSINE` to rows of length 1."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    noise = F.normalize(noise - (noise * rows).sum(dim=1, keepdim=True) * rows, dim=1)
    return COSINE * rows + (1 - COSINE**2) ** 0.5 * noise


def vectors(path: Path, settings: Settings, centers: Tensor | None = None) -> Tensor:
    """Random directions in a mapped file; around `centers`, in turn, where there are some."""
    shape = (settings.images, settings.embed_dim)
    table = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=shape)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(table), BLOCK):
        block = torch.randn(len(table[start : start + BLOCK]), shape[1], generator=generator)
        block = F.normalize(block, dim=1)
        if centers is not None:
            block += centers[torch.arange(start, start + len(block)) % len(centers)]
        table[start : start + BLOCK] = F.normalize(block, dim=1)
    table.flush()
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def measured(settings: Settings, path: Path) -> tuple[str, float, float]:
    """What was found of what was planted, the seconds of the job, and those of the processor."""
    directions = F.normalize(torch.randn(GROUPS, settings.embed_dim), dim=1)
    grouped = settings.job in ("cluster", "select")
    table = vectors(path, settings, directions if grouped else None)
    origin = torch.arange(PLANTED) * (settings.images // (2 * PLANTED))
    if settings.job == "duplicates":
        table[-PLANTED:] = near(table[origin], 1)
    start, used = time.perf_counter(), time.process_time()
    if settings.job == "search":
        _, index = nearest(near(table[origin], 1), table, 10, unit=True)
        found = f"{int((index[:, 0] == origin).sum())} of {PLANTED} originals are first"
    elif settings.job == "duplicates":
        pairs = {tuple(sorted(image for image, _ in one)) for one in groups(table, 0.9)}
        copies = range(settings.images - PLANTED, settings.images)
        planted = {*zip(origin.tolist(), copies, strict=True)}
        found = f"{len(pairs & planted)} of {PLANTED} pairs, {len(pairs - planted)} others"
    elif settings.job == "cluster":
        labels = cluster(table.numpy(), "kmeans", GROUPS, 2, 0)
        score = agreement(np.arange(settings.images) % GROUPS, labels)["nmi"]
        found = f"{GROUPS} groups, NMI {score:.4f}"
    elif settings.job == "select":
        chosen = select(table, "diverse", 100).chosen
        found = f"{len({row % GROUPS for row in chosen})} of {GROUPS} groups among 100 images"
    elif settings.job == "anomalies":
        patches = torch.cat([near(table[origin], 1), F.normalize(torch.randn(10, table.shape[1]))])
        worst = distances(patches, table).topk(10).indices
        found = f"{int((worst >= PLANTED).sum())} of 10 unlike patches among {PLANTED}"
    else:
        halves = [divided(half, 0) for half in (table[::2], table[1::2] * 1.1)]
        one, two = ([g[: KERNEL_IMAGES // len(side)] for g in side] for side in halves)
        truth = (1.1 - 1) ** 2  # of directions that are longer by a tenth
        estimate, kernel = frechet_distance(*halves), kernel_distance(one, two)
        found = f"Frechet {estimate} where {truth:.4f} is true, kernel {kernel}"
    return found, time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    settings = tyro.cli(Settings)
    torch.manual_seed(1)  # another stream than that of the vectors
    with tempfile.TemporaryDirectory() as folder:
        result, seconds, used = measured(settings, Path(folder) / "vectors.npy")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{settings.job}: {settings.images:,} x {settings.embed_dim}: {result}; "
        f"{seconds:.1f} s, of the processor {used:.1f} s, peak {peak:.1f} GiB, "
        f"{torch.get_num_threads()} threads"
    )
