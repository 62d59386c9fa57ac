"""Time and peak memory of one training step: ours against the reference's order of work.

    python benchmarks/training_step.py --batch 8 32 --repeats 3

ViT-S/16, 2 x 224 + 8 x 96 pixels, K = 65536, fp32, drop path .1. Every measurement is a process of
its own, ours and the peer's in turn; seconds are the median step after one warm-up, peak memory is
the process's largest resident set. First both run as a user would run them (the peer on the
default allocator; ours raises glibc's thresholds by itself), then both with thresholds raised.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
GLOBAL, LOCAL, LOCALS, PROTOTYPES = 224, 96, 8, 65536


def ours(batch: int, micro_batch: int | None):  # type: ignore[no-untyped-def]
    from dino.runtime import Ranks
    from dino.train.build import build
    from dino.train.recipes import vanilla

    config = vanilla().changed({"run.batch": batch})
    config = config.changed({"execution.micro_batch": micro_batch})
    distillation = build(config, config.schedules(100), torch.device("cpu"), Ranks())
    steps = iter(range(200, 10_000))  # past the last layer's freeze
    return lambda groups: distillation.step(groups, next(steps)).loss.item()


def peer():  # type: ignore[no-untyped-def]
    from plain_dino import PlainDINO

    network = PlainDINO(PROTOTYPES)
    return lambda groups: network.step([view for group in groups for view in group])


def measure(who: str, batch: int, threads: int, steps: int, kept: bool, micro: int | None) -> dict:
    """One process: build, warm up, time."""
    from dino.runtime import keep_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kept or who == "ours":
        keep_memory()
    step = ours(batch, micro) if who == "ours" else peer()
    groups: list[Tensor] = [
        torch.randn(2, batch, 3, GLOBAL, GLOBAL),
        torch.randn(LOCALS, batch, 3, LOCAL, LOCAL),
    ]
    step(groups)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step(groups)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "peak": peak}


def child(**options: object) -> dict:
    arguments = [f"--{k}={v}" for k, v in options.items() if v not in (None, False)]
    arguments = [a.removesuffix("=True") for a in arguments]
    output = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=3600,
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=2, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro", type=int, default=None, help="our micro-batch")
    parser.add_argument("--who", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who:
        print(
            json.dumps(
                measure(args.who, args.batch[0], args.threads, args.steps, args.kept, args.micro)
            )
        )
        return
    table = Table(
        "batch", "allocator", "who", "s / step", "images / s", "peak GiB", "speed-up", "memory"
    )
    for batch in args.batch:
        for kept in (False, True):
            runs: dict[str, list[dict]] = {"plain": [], "ours": []}
            for _ in range(args.repeats):
                for who, results in runs.items():
                    micro = args.micro if who == "ours" else None
                    results.append(
                        child(
                            who=who,
                            batch=batch,
                            threads=args.threads,
                            steps=args.steps,
                            kept=kept,
                            micro=micro,
                        )
                    )
            seconds = {w: statistics.median(r["seconds"] for r in rs) for w, rs in runs.items()}
            peak = {w: max(r["peak"] for r in rs) for w, rs in runs.items()}
            for who in runs:
                table.add_row(
                    str(batch),
                    "raised for both" if kept else "as it comes",
                    who,
                    f"{seconds[who]:.2f}",
                    f"{batch / seconds[who]:.2f}",
                    f"{peak[who] / 2**30:.2f}",
                    f"{seconds['plain'] / seconds[who]:.2f}",
                    f"{peak[who] / peak['plain']:.2f}",
                )
    console = Console(width=110)
    console.print(table)
    model = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "",
    )
    console.print(
        f"{model}, {args.threads} threads, torch {torch.__version__}, "
        f"median of {args.repeats} processes of {args.steps} steps"
    )


if __name__ == "__main__":
    main()
