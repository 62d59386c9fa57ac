"""Labels carried to one video frame: ours by tiles and windows, the peer by full masked affinities.

    python benchmarks/video.py --threads 2

Frames of 480 x 832 pixels at patch 16 (30 x 52 patches) and patch 8 (60 x 104), eight frames of
context, ViT-S's width, three labels, the paper's settings. The peer is the published method: the
affinities of all pairs, times a mask of all pairs, the five largest of each column, a product with
all labels. Both get the same features (of patches that resemble their neighbours and the frame
before) and must agree. In turn in one process, the median of `--repeats` after one warm-up each;
the speed-up is the median of the ratios of neighbouring runs. CPU seconds are those of all threads.
MB is the peak of a fresh process that does one frame, less that of one which only makes the
features. With --keep-memory glibc keeps what is freed (`dino.runtime.keep_memory`), for both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino.evaluate.video.propagation import Neighbourhood, directions, propagate
from dino.runtime import keep_memory

GRIDS = {16: (30, 52), 8: (60, 104)}
CONTEXT, WIDTH, LABELS, RADIUS, TOP, TEMPERATURE = 8, 384, 3, 12, 5, 0.1


def frames(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Features [1 + CONTEXT, D, h, w] and labels [CONTEXT, C, h, w]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, WIDTH, grid[0] // 4, grid[1] // 4, generator=generator)
    scene = F.interpolate(coarse, grid, mode="bilinear")
    features = scene + 0.5 * torch.randn(1 + CONTEXT, WIDTH, *grid, generator=generator)
    labels = torch.rand(CONTEXT, LABELS, *grid, generator=generator)
    return features, labels


# ------------------------------------------------------------------------------------ the peer
def window_mask(height: int, width: int, limit: int | None = None) -> Tensor:
    """Pairs of patches within the window, entry by entry, as published; `limit` rows of it only."""
    mask = torch.zeros(height, width, height, width)
    for i in range(height if limit is None else limit):
        for j in range(width):
            for y in range(i - RADIUS, i + RADIUS + 1):
                for x in range(j - RADIUS, j + RADIUS + 1):
                    if 0 <= y < height and 0 <= x < width:
                        mask[i, j, y, x] = 1
    return mask.view(height * width, height * width)


def quick_mask(height: int, width: int) -> Tensor:
    """The same mask, for measuring what comes after it."""
    rows, columns = torch.arange(height), torch.arange(width)
    near = (rows[:, None] - rows).abs() <= RADIUS
    beside = (columns[:, None] - columns).abs() <= RADIUS
    pairs = near[:, None, :, None] & beside[None, :, None]
    return pairs.float().view(height * width, height * width)


def masked_affinity(target: Tensor, context: list[Tensor], labels: Tensor, mask: Tensor) -> Tensor:
    """Labels [C, P] from features [P, D] of the frame and [D, P] of each frame of context."""
    sources = F.normalize(torch.stack(context), dim=1)
    targets = F.normalize(target, dim=1).expand(len(context), -1, -1)
    affinity = torch.exp(torch.bmm(targets, sources) / TEMPERATURE)
    affinity *= mask
    affinity = affinity.transpose(2, 1).reshape(-1, len(target))
    least = affinity.topk(TOP, dim=0).values.amin(dim=0)
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(dim=0, keepdim=True)
    flat = labels.flatten(2).transpose(2, 1).reshape(-1, labels.shape[1])
    return flat.T @ affinity


class Peer:
    def __init__(self, features: Tensor, labels: Tensor, mask: Tensor) -> None:
        self.target = features[0].flatten(1).T.contiguous()
        self.context = [frame.flatten(1) for frame in features[1:]]
        self.labels = labels
        self.mask = mask.expand(CONTEXT, -1, -1).contiguous()  # kept once for each frame of context

    def __call__(self) -> Tensor:
        return masked_affinity(self.target, self.context, self.labels, self.mask)


class Ours:
    """Labels of one frame from a full context, as `Propagator.step` computes them."""

    def __init__(self, features: Tensor, labels: Tensor, radius: int | None = RADIUS) -> None:
        self.how = Neighbourhood(radius=radius, neighbours=TOP, temperature=TEMPERATURE)
        self.target, self.context = features[0], directions(features[1:])
        self.labels = labels.permute(0, 2, 3, 1).contiguous()

    def __call__(self) -> Tensor:
        found = propagate(directions(self.target), self.context, self.labels, self.how)
        return found.permute(2, 0, 1)


# ------------------------------------------------------------------------------------ measuring
def peak(who: str, patch: int, threads: int, answer: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    features, labels = frames(GRIDS[patch])
    if who == "peer":
        Peer(features, labels, quick_mask(*GRIDS[patch]))()
    elif who == "ours":
        Ours(features, labels)()
    elif who == "anywhere":
        Ours(features, labels, radius=None)()
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak as well
    answer.put(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peak_of(who: str, patch: int, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak, args=(who, patch, threads, answer), daemon=True)
    process.start()
    result = answer.get(timeout=3600)
    process.join(timeout=60)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patches", type=int, nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_memory()
    columns = ("patch", "patches", "who", "s a frame", "CPU s", "speed-up", "MB", "setup")
    table = Table(*columns)
    for patch in args.patches:
        grid = GRIDS[patch]
        features, labels = frames(grid)
        rows = 1 if patch == 8 else 3
        started = time.perf_counter()
        window_mask(*grid, rows)
        building = (time.perf_counter() - started) * grid[0] / rows
        who = {"peer": Peer(features, labels, quick_mask(*grid)), "ours": Ours(features, labels)}
        first = {name: one().flatten() for name, one in who.items()}
        torch.testing.assert_close(first["ours"], first["peer"], rtol=1e-4, atol=1e-5)
        seconds: dict[str, list[float]] = {name: [] for name in who}
        busy: dict[str, list[float]] = {name: [] for name in who}
        for _ in range(args.repeats):
            for name, one in who.items():
                started, working = time.perf_counter(), time.process_time()
                one()
                seconds[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - working)
        nothing = peak_of("nobody", patch, args.threads)
        for name, times in seconds.items():
            ratio = statistics.median(
                slow / quick for slow, quick in zip(seconds["peer"], times, strict=True)
            )
            table.add_row(
                f"{patch}",
                f"{grid[0]} x {grid[1]}",
                name,
                f"{statistics.median(times):.3f}",
                f"{statistics.median(busy[name]):.3f}",
                f"{ratio:.1f}",
                f"{peak_of(name, patch, args.threads) - nothing:.0f}",
                f"mask {building:.0f} s" if name == "peer" else "none",
            )
        memory = peak_of("anywhere", patch, args.threads) - nothing
        table.add_row(f"{patch}", "", "ours, radius None", "", "", "", f"{memory:.0f}", "none")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
