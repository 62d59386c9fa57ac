"""k-NN accuracy against hours of training: ours and lightly's DINO on the same network and cores.

    python benchmarks/quality_per_hour.py --data imagenette-128 --out quality --minutes 60

`--set` changes settings of our recipe; both train its network from the same initial weights, one
after the other, with the same threads and workers. Each gets `--minutes` of training: a few steps
are timed, and its entire schedule is made to end then. Evaluations (our k-NN with k = 20 of
`val` in `train`, of the teacher; of lightly the better of student and teacher) do not count. The
untrained network and raw pixels stand beside them. The same command continues where it stopped;
rows.jsonl, table.txt and quality.png are in `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightly_dino import LightlyDINO, Views
from rich.console import Console

from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.knn import measure
from dino.evaluate.classification.knn_classifier import TEMPERATURE
from dino.features.command import number_table
from dino.features.extractor import extract
from dino.features.raw_pixels import raw_pixels
from dino.features.table import FeatureTable
from dino.files import atomic_write
from dino.models.backbone import Backbone
from dino.runtime import Ranks, cores, default_workers, describe, keep_memory, pick_device
from dino.train.build import build
from dino.train.config import PretrainConfig
from dino.train.loop import train
from dino.train.recipes import recipe
from dino.train.run_log import read_metrics
from dino.weights.checkpoint import last_step

K = 20
TINY: dict[str, Any] = {
    **{"model.embed_dim": 24, "model.depth": 2, "model.heads": 2, "model.patch_size": 8},
    **{"head.prototypes": 16, "head.hidden": 16, "head.bottleneck": 8},
    **{"views.global_size": 32, "views.local_size": 16, "views.local_count": 2, "run.batch": 4},
}
WHOLE_RUN = {"optim.warmup": "10%", "optim.freeze_last_layer": "3%"}
"""Of small_data, in shares of the run, since it may have few epochs; `--set` has precedence."""


class Clock:
    """Minutes of training, over all calls, without what is done in `paused`."""

    def __init__(self, minutes: float) -> None:
        self._since = time.perf_counter() - 60 * minutes

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self._since) / 60

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started


class Rows:
    """The measurements, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )

    def of(self, who: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["who"] == who]

    def add(self, **row: Any) -> None:
        self.keep([*self.rows, row])

    def keep(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Trial:
    """What both trainers share."""

    config: PretrainConfig
    bank: Source
    queries: Source
    args: argparse.Namespace
    rows: Rows
    device: torch.device

    def accuracy(self, bank: FeatureTable, queries: FeatureTable) -> float:
        ((_, score),) = measure(bank, queries, (K,)).votes.accuracies(TEMPERATURE).items()
        return score.top1

    def knn(self, backbone: Backbone) -> float:
        tables = (
            extract(backbone, s, workers=self.args.workers) for s in (self.bank, self.queries)
        )
        return self.accuracy(*tables)

    def network(self) -> Backbone:
        """The network before training, the same at every call."""
        schedules = self.config.changed({"run.duration": "100 epochs"}).schedules(100)
        trained = build(self.config, schedules, self.device, Ranks())
        return copy.deepcopy(trained.student.backbone)


# ---------------------------------------------------------------------------------- baselines
def baselines(trial: Trial) -> None:
    if trial.rows.of("raw pixels"):
        return
    trial.rows.add(who="untrained", minutes=0.0, knn=trial.knn(trial.network()))
    pixels = (raw_pixels(s, workers=trial.args.workers) for s in (trial.bank, trial.queries))
    trial.rows.add(who="raw pixels", minutes=0.0, knn=trial.accuracy(*pixels))


# ---------------------------------------------------------------------------------- ours
class TimedKNN:
    """An `Evaluation` whose results become rows with the minutes of training before them."""

    name = "knn"

    def __init__(self, trial: Trial, clock: Clock, every: int, done: int) -> None:
        self.trial, self.clock, self.every, self.step = trial, clock, every, done // every * every
        self.num_queries = len(trial.queries)
        self.num_images = self.num_queries + len(trial.bank)

    def run(self, backbone: Backbone) -> dict[str, float]:
        with self.clock.paused():
            found = self.trial.knn(backbone)
        self.step += self.every
        self.trial.rows.add(who="ours", step=self.step, minutes=self.clock.minutes, knn=found)
        return {f"k{K}": found}


def steps_in_time(trial: Trial) -> int:
    """Steps of our run in `--minutes`, a multiple of the number of evaluations."""
    count = 2 if trial.args.tiny else 8
    settings = {"run.duration": f"{count} steps", "execution.log_every": "1 steps"}
    settings |= {"execution.checkpoint_every": "0 steps"}
    with tempfile.TemporaryDirectory() as folder:
        train(trial.config.changed(settings), trial.bank, folder, device=trial.device)
        rates = [line["images_per_s"] for line in read_metrics(folder) if "images_per_s" in line]
    batch = trial.config.run.batch
    steps = 60 * trial.args.minutes * median(rates[count // 2 :]) / batch
    return max(1, round(steps / trial.args.points)) * trial.args.points


def ours(trial: Trial) -> None:
    run, rows, points = trial.args.out / "ours", trial.rows, trial.args.points
    if not (plan := rows.of("ours, plan")):
        rows.add(who="ours, plan", steps=steps_in_time(trial))
        plan = rows.of("ours, plan")
    steps, last = plan[0]["steps"], last_step(run / "checkpoints")
    done = int(last.name.removeprefix("step_")) if last else 0
    if done >= steps:
        return
    rows.keep([row for row in rows.rows if row["who"] != "ours" or row["step"] <= done])
    before = [row["minutes"] for row in rows.of("ours") if row["step"] == done]
    every = f"{steps // points} steps"
    config = trial.config.changed(
        {
            "run.duration": f"{steps} steps",
            "execution.knn_every": every,
            "execution.checkpoint_every": every,
        }
    )
    clock = Clock(before[-1] if before else 0.0)
    evaluation = TimedKNN(trial, clock, steps // points, done)
    result = train(config, trial.bank, run, device=trial.device, evaluations=[evaluation])
    if not result.finished:  # a signal: the step is saved, so its minutes are too
        rows.add(who="ours", step=result.step, minutes=clock.minutes)
        sys.exit("stopped: the same command continues")


# ---------------------------------------------------------------------------------- lightly's
def epochs_in_time(trial: Trial, views: Views) -> int:
    """Epochs of lightly's training in `--minutes`."""
    batch, count = trial.config.run.batch, 2 if trial.args.tiny else 8
    trained = LightlyDINO(trial.network(), 100, batch, trial.device)
    times = trained.train_epoch(views, trial.args.workers, count)
    step = (times[-1] - times[0]) / (count - 1)  # without the start of the workers
    return max(1, round(60 * trial.args.minutes / (step * (len(views) // batch))))


def lightlys(trial: Trial) -> None:
    path, rows, config = trial.args.out / "lightly.pt", trial.rows, trial.config
    views = Views(trial.bank, config.views.global_size, config.views.local_size)
    if not (plan := rows.of("lightly, plan")):
        rows.add(who="lightly, plan", epochs=epochs_in_time(trial, views))
        plan = rows.of("lightly, plan")
    epochs = plan[0]["epochs"]
    torch.manual_seed(config.run.seed)
    trained = LightlyDINO(trial.network(), epochs, config.run.batch, trial.device)
    before = trained.restore(path)["minutes"] if path.exists() else 0.0
    rows.keep([r for r in rows.rows if r["who"] != "lightly" or r["epoch"] <= trained.epoch])
    points = {round(epochs * (n + 1) / trial.args.points) for n in range(trial.args.points)}
    clock = Clock(before)
    while trained.epoch < epochs:
        trained.train_epoch(views, trial.args.workers)
        minutes = clock.minutes
        with clock.paused():
            if trained.epoch in points:
                networks = {"student": trained.student[0], "teacher": trained.teacher[0]}
                found = {name: trial.knn(network) for name, network in networks.items()}
                about = {"epoch": trained.epoch, "minutes": minutes}
                rows.add(who="lightly", **about, knn=max(found.values()), **found)
            trained.save(path, minutes=minutes)


# ---------------------------------------------------------------------------------- results
def curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """Minutes and k-NN of each trainer, from the untrained network on."""
    start = [(0.0, row["knn"]) for row in rows.of("untrained")]
    found = {}
    for who in ("ours", "lightly"):
        points = [(row["minutes"], row["knn"]) for row in rows.of(who) if "knn" in row]
        if points:
            found[who] = start + points
    return found


def minutes_to(target: float, curve: list[tuple[float, float]]) -> float | None:
    """When a curve first reaches `target`, on the line between its points; None if it does not."""
    if curve[0][1] >= target:
        return 0.0
    for (t0, a), (t1, b) in pairwise(curve):
        if a < target <= b:
            return t0 + (t1 - t0) * (target - a) / (b - a)
    return None


def results(trial: Trial) -> None:
    """Print and write the table, draw the picture."""
    found = curves(trial.rows)
    lines = {}
    for who in ("untrained", "raw pixels"):
        lines[who] = ["", f"{trial.rows.of(who)[0]['knn']:.1f}", "", ""]
    for who, curve in found.items():
        others = [points for name, points in found.items() if name != who]
        reached = minutes_to(others[0][-1][1], curve) if others else None
        lines[who] = [
            f"{curve[-1][0]:.1f}",
            f"{curve[-1][1]:.1f}",
            f"{max(value for _, value in curve):.1f}",
            "-" if reached is None else f"{reached:.1f}",
        ]
    columns = ["features", "minutes", f"k-NN %, k = {K}", "best", "minutes to the other's last"]
    model = trial.config.model.arch
    title = f"{model}, {len(trial.bank):,} images, {len(trial.queries):,} queries"
    console = Console(record=True, width=100)
    console.print(number_table(title, columns, lines))
    console.print(
        f"{describe(trial.device)}, {trial.args.workers} workers, torch {torch.__version__}"
    )
    atomic_write(trial.args.out / "table.txt", console.export_text())
    draw(trial, found)


def draw(trial: Trial, found: dict[str, list[tuple[float, float]]]) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for who, curve in found.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=who)
    for who, style in (("untrained", ":"), ("raw pixels", "--")):
        axes.axhline(trial.rows.of(who)[0]["knn"], color="grey", linestyle=style, label=who)
    axes.set(xlabel="minutes of training", ylabel=f"k-NN accuracy, %, k = {K}")
    axes.set_title(f"{trial.config.model.arch}, {len(trial.bank):,} images")
    axes.legend()
    figure.savefig(trial.args.out / "quality.png", dpi=150)
    plt.close(figure)


def settings(text: str) -> dict[str, Any]:
    """Settings of the recipe as JSON; lists become tuples."""
    content = json.loads(text)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/ of classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, for each")
    parser.add_argument(
        "--who", nargs="+", choices=["ours", "lightly"], default=["ours", "lightly"]
    )
    parser.add_argument("--recipe", default="small_data", help="of ours")
    parser.add_argument("--set", type=settings, default={}, help='{"run.batch": 64, ...}')
    parser.add_argument("--points", type=int, default=8, help="evaluations on the way")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lightly", type=Path, help="a folder into which lightly was installed")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for a check")
    args = parser.parse_args()
    if args.lightly:
        sys.path.append(str(args.lightly))
    data, val = use_splits(args.data, None)
    if val is None:
        parser.error("--data must hold train/ and val/, each with a folder for each class")
    torch.set_num_threads(args.threads)
    keep_memory()
    config = recipe(args.recipe).changed(
        {**WHOLE_RUN, **(TINY if args.tiny else {}), **args.set, "execution.workers": args.workers}
    )
    config = config.for_architecture(args.set)
    config.check()
    args.out.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        config,
        open_source(data),
        open_source(val),
        args,
        Rows(args.out / "rows.jsonl"),
        pick_device(args.device),
    )
    about = {"who": "settings", "settings": json.loads(json.dumps(config.flat()))}
    about |= {"minutes": args.minutes, "threads": args.threads, "points": args.points}
    if (first := trial.rows.of("settings")) and first[0] != about:
        parser.error(f"{args.out} holds rows of other settings: choose another --out")
    if not first:
        trial.rows.add(**about)
    baselines(trial)
    if "ours" in args.who:
        ours(trial)
    if "lightly" in args.who:
        lightlys(trial)
    results(trial)


if __name__ == "__main__":
    main()
