"""A small recipe on a folder of images, as long as the card has time: k-NN and attention.

    python benchmarks/gpu/train.py --data imagenette-128 --out runs/gpu --total 25

The first call times some steps and fixes the length of the run, so that it ends after `--total`
minutes of this card; each call trains for `--minutes` and saves. The same command continues (exit
status 3: the run is not at its end). At the end stand the k-NN accuracies, `report.html` and
`attention.png`, the attention of the last block's heads on images that were not trained on.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from rows import UNFINISHED, Rows, arguments, machine

import dino
from dino.data.images.decode import as_picture
from dino.data.images.map_overlay import colored, overlay
from dino.data.sampler import spread
from dino.data.sources.folder import use_splits
from dino.data.sources.open import open_source
from dino.features.command import number_table
from dino.models.attention import attention_maps
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device
from dino.train.loop import train
from dino.train.recipes import small_data
from dino.train.run_log import read_metrics

SETTINGS: dict[str, Any] = {
    # Images of 128 px: views of 112 and 48 px, a grid of 7 x 7 patches.
    "model.arch": "vit_small",
    "model.patch_size": 16,
    "model.position": "exact",
    "views.global_size": 112,
    "views.global_scale": (0.3, 1.0),
    "views.local_size": 48,
    "views.local_scale": (0.05, 0.3),
    "views.local_count": 6,
    # Few images, many epochs: few prototypes, sharp targets, short warm-ups in shares of the run.
    "head.prototypes": 4096,
    "teacher.momentum": 0.99,
    "teacher.momentum_end": 0.9995,
    "optim.lr": 1e-3,
    "optim.warmup": "10%",
    "optim.freeze_last_layer": "2%",
    "optim.weight_decay_end": 0.2,
    "run.batch": 256,
    "execution.checkpoint_every": "2%",
    "execution.knn_every": "5%",
    "execution.log_every": "10 steps",
}
"""What differs from the recipe small_data."""

TINY: dict[str, Any] = {
    **{"model.embed_dim": 24, "model.depth": 2, "model.heads": 2, "head.prototypes": 16},
    **{"head.hidden": 16, "head.bottleneck": 8, "views.global_size": 32, "views.local_size": 16},
    **{"views.local_count": 2, "run.batch": 4, "execution.workers": 0},
    **{"execution.knn_every": "50%", "execution.log_every": "1 steps"},
}
SHARE = 0.9
"""Of the total time that training gets; the rest is for k-NN on the way, starts and the report."""
PHOTOS = 6
NEAREST = Image.Resampling.NEAREST


def length(data: str, settings: dict[str, Any], minutes: float, args: Any) -> int:
    """Steps of a run of so many minutes on this machine, from a run of some steps."""
    count = 4 if args.tiny else 120
    trial = {"run.duration": f"{count} steps", "execution.knn_every": "0 steps"}
    trial["execution.checkpoint_every"] = "0 steps"
    with tempfile.TemporaryDirectory() as folder:
        config = small_data().changed({**settings, **trial})
        train(config, open_source(data), folder, device=pick_device(args.device))
        lines = [line["images_per_s"] for line in read_metrics(folder) if "images_per_s" in line]
    rate = median(lines[len(lines) // 2 :])  # past the start of the workers
    return max(1, round(SHARE * 60 * minutes * rate / config.run.batch))


def stop_after(seconds: float) -> threading.Event:
    """Stop the training loop by the signal that makes it save; it changes nothing outside of it.

    Set the event to take that back.
    """
    done, process = threading.Event(), os.getpid()

    def remind() -> None:
        pause = max(0.0, seconds)
        while not done.wait(timeout=pause):
            os.kill(process, signal.SIGTERM)
            pause = 1.0  # the first may come before the loop has begun

    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=remind, daemon=True).start()
    return done


def attention_picture(backbone: Backbone, data: str, size: int) -> Image.Image:
    """A row for each image: the image, the mean of the heads over it, each head alone."""
    source, device = open_source(data), next(backbone.parameters()).device
    transform = replace(backbone.preprocessing, resize=size, crop=size)
    mean, std = (torch.tensor(x)[:, None, None] for x in (transform.mean, transform.std))
    rows = []
    for index in spread(len(source), PHOTOS):
        pixels = transform(source[index])
        picture = as_picture((pixels * std + mean).mul(255).round().clamp(0, 255).byte())
        maps = attention_maps(backbone, pixels[None].to(device))[0].cpu()
        heads = [colored(one, "viridis").resize(picture.size, NEAREST) for one in maps]
        rows.append([picture, overlay(picture, maps.mean(dim=0)), *heads])
    cell = size + 4
    sheet = Image.new("RGB", (len(rows[0]) * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * cell, y * cell))
    return sheet


def finish(run: Path, val: str, size: int, device: str) -> None:
    """Print the curve of k-NN and write the picture."""
    curve = [line for line in read_metrics(run) if "knn" in line]
    rows = {f"{line['step']:,}": [f"{x:.1f}" for x in line["knn"].values()] for line in curve}
    Console().print(number_table("k-NN while training, %", ["step", *curve[-1]["knn"]], rows))
    picture = attention_picture(dino.load(run, pick_device(device)), val, size)
    picture.save(run / "attention.png")
    Console().print(f"{run / 'attention.png'}\n{run / 'report.html'}", soft_wrap=True)


def main() -> None:
    parser = arguments(__doc__, "runs/gpu")
    parser.add_argument("--data", required=True, help="a folder with train/ and val/ of classes")
    parser.add_argument("--total", type=float, default=25.0, help="minutes of the run")
    args = parser.parse_args()
    data, val = use_splits(args.data, None)
    if val is None:
        parser.error("--data must hold train/ and val/, each with a folder for each class")
    settings = {**SETTINGS, **(TINY if args.tiny else {})}
    plan = Rows(args.out / "plan.jsonl", args.minutes)
    if not plan.rows:
        steps = length(data, settings, args.total, args)
        plan.add(steps=steps, total=args.total, **machine(pick_device(args.device)))
    settings["run.duration"] = f"{plan.rows[0]['steps']} steps"
    done = stop_after(plan.seconds)
    result = dino.pretrain(
        "small_data",
        data=data,
        val=val,
        out=args.out / "run",
        device=args.device,
        settings=settings,
    )
    done.set()
    if not result.finished:
        print(f"step {result.step} of {result.total}: the same command continues")
        sys.exit(UNFINISHED)
    finish(result.run, val, 2 * settings["views.global_size"], args.device)


if __name__ == "__main__":
    main()
