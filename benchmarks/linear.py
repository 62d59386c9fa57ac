"""Linear layers on a CPU: ours (through oneDNN's convolution) against `F.linear`, fp32.

    python benchmarks/linear.py --threads 2

The four layers of a block of ViT-S/16 on the tokens of 2 x 8 global and 8 x 8 local views, forward
and backward, in turn in one process; the median of `--repeats` after one warm-up each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from dino.models.cpu_linear import linear
from dino.runtime import keep_memory

LAYERS = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}
ROWS = {"global": 16 * 197, "local": 64 * 37}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_memory()

    table = Table("layer", "rows", "pass", "F.linear GFLOP/s", "ours GFLOP/s", "speed-up")
    for name, (inputs, outputs) in LAYERS.items():
        for rows in ROWS.values():
            x = torch.randn(rows, inputs, requires_grad=True)
            weight = torch.randn(outputs, inputs, requires_grad=True)
            bias, upstream = torch.randn(outputs, requires_grad=True), torch.randn(rows, outputs)
            seconds: dict[tuple[str, str], list[float]] = {}
            for repeat in range(args.repeats + 1):
                for who, function in (("plain", F.linear), ("ours", linear)):
                    started = time.perf_counter()
                    y = function(x, weight, bias)
                    middle = time.perf_counter()
                    torch.autograd.grad(y, (x, weight, bias), upstream)
                    if repeat:
                        seconds.setdefault((who, "forward"), []).append(middle - started)
                        seconds.setdefault((who, "backward"), []).append(
                            time.perf_counter() - middle
                        )
            for which, products in (("forward", 1), ("backward", 2)):
                work = products * 2 * rows * inputs * outputs / 1e9
                plain, ours = (statistics.median(seconds[who, which]) for who in ("plain", "ours"))
                table.add_row(
                    name,
                    str(rows),
                    which,
                    f"{work / plain:.0f}",
                    f"{work / ours:.0f}",
                    f"{plain / ours:.2f}",
                )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
