"""A folder with every kind of bad file, trained to the end: is the list of what was skipped exact?

    python benchmarks/bad_files.py --files 10000

Of the files, 1 % each are truncated, empty, text, decompression bombs (a PNG whose header claims
10^12 pixels) and arrays of five channels; 1 % each vanish or become folders after the folder was
scanned. A tiny network is trained on all of them for one epoch, so that every file is met once.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.small import TINY_RUN
from helpers.spoiled import KINDS, spoil

import dino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="a multiple of 100")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder, "images"), Path(folder, "run")
        source, wrong = spoil(root, args.files, args.files // 100)
        settings = {
            **TINY_RUN,
            "run.batch": 100,
            "run.duration": "1 epochs",
            "execution.workers": args.workers,
            "execution.checkpoint_every": "1 epochs",
            "execution.log_every": "10 steps",
        }
        started = time.perf_counter()
        result = dino.pretrain("demo", data=source, out=run, device="cpu", settings=settings)
        seconds = time.perf_counter() - started
        with (run / "skipped.csv").open(newline="", encoding="utf-8") as file:
            listed = {line["path"]: line["defect"] for line in csv.DictReader(file)}
    assert result.finished, result
    assert listed == wrong, f"{len(listed.items() ^ wrong.items())} lines differ"
    assert Counter(listed.values()) == dict.fromkeys(KINDS, args.files // 100)
    print(f"{args.files:,} files, {len(wrong):,} of them bad: all listed, each with its defect;")
    print(f"{result.step} of {result.total} steps in {seconds:.0f} s, {args.workers} workers")


if __name__ == "__main__":
    main()
