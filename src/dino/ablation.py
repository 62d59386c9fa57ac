"""`dino ablate`: the rows of a table of the paper, trained in small, beside the paper's numbers.

Every row is a run folder OUT/ROW/seed-N. All rows process equally many images, in as many steps as
their batch makes of them; seeds are trained one after the other, so that results exist early.
`plan.json` holds what was decided at the start; the same command resumes.
"""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from scipy.stats import spearmanr

from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.distillation.collapse import CollapseMonitor
from dino.evaluate.classification.knn import KNNEvaluation
from dino.evaluate.results import file_name
from dino.features.cache import versions
from dino.features.command import Images, OptionalImages, Workers, number_table, print_path
from dino.files import (
    UserError,
    atomic_json,
    atomic_write,
    check_output,
    check_outside,
    finite_json,
    read_json,
)
from dino.progress import Console
from dino.runtime import Ranks, describe, gather_objects, keep_memory, pick_device, process_group
from dino.settings import Range, validated
from dino.show.report.ablation import ablation_page, columns, row_cells
from dino.train.ablations import NETWORKS, TABLES, Network, Row, Table, configuration, table
from dino.train.loop import train
from dino.train.planning.budget import parse, timed_network
from dino.train.planning.introduction import duration
from dino.train.run_log import read_metrics

IMAGES, K = 2_000, 20
"""Most images of the bank and of the queries for k-NN, and its neighbours."""
RUN_SECONDS = 10.0
"""Of each run beside its steps: measuring its speed, k-NN, saving."""
USEFUL_IMAGES = 1e5
"""Processed images of a run for the time that `dino ablate list` names."""
LINES = 5
"""Lines of metrics at the end of a run whose mean decides whether it has collapsed."""


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Train the rows of a table of the paper on a small network, and compare with its numbers.

    Accuracies are k-NN's, so the images need classes (sub-folders).
    """

    data: Images
    """Images with one sub-folder for each class, or demo."""
    val: OptionalImages = None
    """Labelled images to measure on; by default each training image is compared with all others."""
    budget: str = "30m"
    """Time for all rows and seeds on this machine, such as 30m or 2h: it decides the network and
    how long it is trained."""
    seeds: Annotated[int, Range(low=1, high=100)] = 3
    """Runs of each row, whose spread is the error bar."""
    out: Path
    """Folder for the runs, results.json and page.html; the same command resumes it."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Workers | None = None
    """Processes that read images; by default the cores but one, at most 16."""


@dataclass(frozen=True)
class Plan:
    """What is trained, decided once: `plan.json`.

    Attributes:
        table: its name.
        data, val: as given.
        budget: in seconds.
        seeds: runs of each row.
        network: index in `NETWORKS`.
        images: processed images of each run.
        speeds: images a second of each row, as they were timed.
    """

    table: str
    data: str
    val: str | None
    budget: float
    seeds: int
    network: int = 0
    images: int = 0
    speeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        knn: top-1 of the teacher in percent.
        collapse: its name (`CollapseMonitor`); "" for none.
        measures: means of the last lines of its metrics.
    """

    knn: float
    collapse: str
    measures: dict[str, float]


def run(name: str, settings: AblationSettings) -> bool:
    """`dino ablate TABLE`: a table on the terminal, results.json and page.html.

    Returns:
        Whether all runs are finished; a signal stops them.

    Raises:
        UserError: for an unknown table, images without classes, or a folder with another plan.
    """
    settings, found = validated(settings), table(name)
    check_output(settings.out, folder=True)
    keep_memory()
    data, val = settings.data, settings.val
    if data == "demo" and val is None:
        val = "demo:test"
    else:
        data, val = use_splits(data, val)
    for images in (data, val):
        check_outside(settings.out, images)
    device = pick_device(settings.device)
    source = open_source(data)
    queries = None if val is None else open_source(val)
    if source.labels is None or (queries is not None and queries.labels is None):
        raise UserError("the rows are compared by k-NN, which needs classes: sub-folders in --data")
    with process_group(device) as ranks:
        console = Console(stderr=True, quiet=not ranks.main)
        requested = Plan(
            table=next(key for key, value in TABLES.items() if value is found),
            data=str(data),
            val=None if val is None else str(val),
            budget=parse(settings.budget).seconds,
            seeds=settings.seeds,
        )
        plan = _resumed(settings.out, requested)
        if plan is None:
            plan = gather_objects(_planned(requested, found, source, device, ranks, console))[0]
        if ranks.main:
            atomic_json(settings.out / "plan.json", asdict(plan))
        evaluation = KNNEvaluation(source, queries, k=(K,), limit=IMAGES)
        outcomes: dict[int, list[Outcome]] = {index: [] for index in range(len(found.rows))}
        content: dict[str, Any] = {}
        for seed, index in _in_order(plan, found, console):
            outcome = _trained(settings, plan, found.rows[index], seed, source, evaluation, device)
            if outcome is None:
                return False
            outcomes[index].append(outcome)
            if ranks.main:
                content = _write(settings, plan, found, outcomes, describe(device))
        if ranks.main:
            _print(settings.out, content)
    return True


def _in_order(plan: Plan, found: Table, console: Console) -> Iterator[tuple[int, int]]:
    """Seed and row of every run; before each, the time that all that are left will take."""
    runs = [(seed, index) for seed in range(plan.seeds) for index in range(len(found.rows))]
    cost = [plan.images / plan.speeds[index] + RUN_SECONDS for _, index in runs]
    spent = expected = 0.0
    for number, (seed, index) in enumerate(runs):
        slower = spent / expected if expected else 1.0
        console.print(
            f"run {number + 1} of {len(runs)}: {found.rows[index].name}, seed {seed}; about "
            f"{duration(slower * sum(cost[number:]))} left for all",
            style="bold",
        )
        started = time.monotonic()
        yield seed, index
        if (seconds := time.monotonic() - started) > cost[number] / 4:  # it was not done before
            spent, expected = spent + seconds, expected + cost[number]


def _resumed(out: Path, requested: Plan) -> Plan | None:
    """The plan in a folder; None if there is none.

    Raises:
        UserError: if it is another.
    """
    path = out / "plan.json"
    if not path.exists():
        return None
    content = read_json(path)
    try:
        plan = Plan(**{**content, "speeds": tuple(content["speeds"])})
    except (TypeError, KeyError):
        raise UserError(f"{path} is no plan of 'dino ablate': choose another --out") from None
    for name in ("table", "data", "val", "budget", "seeds"):
        if getattr(plan, name) != getattr(requested, name):
            raise UserError(
                f"{out} holds an ablation with {name} {getattr(plan, name)}, not "
                f"{getattr(requested, name)}: choose another --out, or the same to resume"
            )
    return plan


def _planned(
    requested: Plan,
    found: Table,
    source: Source,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> Plan:
    """The network that fits the budget, and how many images each run processes."""

    def speed(network: Network, row: Row) -> float:
        config = configuration(network, row, 0)
        candidate = gather_objects(timed_network(config, source, device, ranks))[0]
        if not candidate.speed:
            raise UserError(f"{row.name}: {candidate.problem}")
        return candidate.speed

    started, rows, runs = time.monotonic(), len(found.rows), len(found.rows) * requested.seeds
    chosen = 0
    with console.status("timing networks"):
        for index, network in enumerate(NETWORKS):
            seconds = requested.budget / runs - RUN_SECONDS
            if index and speed(network, found.rows[0]) * seconds < network.images:
                break
            chosen = index
        speeds = tuple(speed(NETWORKS[chosen], row) for row in found.rows)
    left = requested.budget - (time.monotonic() - started) - runs * RUN_SECONDS
    images = int(left / (requested.seeds * sum(1 / speed for speed in speeds)))
    batch = max(configuration(NETWORKS[chosen], row, 0).run.batch for row in found.rows)
    if images < 20 * batch:
        needed = runs * RUN_SECONDS + requested.seeds * sum(20 * batch / speed for speed in speeds)
        raise UserError(
            f"{rows} rows with {requested.seeds} seeds take at least {duration(1.2 * needed)}: "
            "give a larger --budget or fewer --seeds"
        )
    console.print(
        f"{rows} rows x {requested.seeds} seeds: {images:,} images a run "
        f"({images / len(source):.0f} epochs), {_described(NETWORKS[chosen])}",
        soft_wrap=True,
    )
    return replace(requested, network=chosen, images=images, speeds=speeds)


def _described(network: Network) -> str:
    config = configuration(network, Row("", {}, None), 0)
    model, views = config.model, config.views
    return (
        f"a ViT of {model.depth} blocks of {model.embed_dim}, patches of {model.patch_size}, views "
        f"of {views.global_size} and {views.local_size} px, K = {config.head.prototypes}"
    )


def _trained(
    settings: AblationSettings,
    plan: Plan,
    row: Row,
    seed: int,
    source: Source,
    evaluation: KNNEvaluation,
    device: torch.device,
) -> Outcome | None:
    """How a run ends, which is trained if it is not finished; None if a signal stopped it."""
    config = configuration(NETWORKS[plan.network], row, seed)
    steps = max(1, plan.images // config.run.batch)
    config = config.changed(
        {
            "run.duration": f"{steps} steps",
            "execution.checkpoint_every": "20%",
            "execution.knn_every": "100%",
            "execution.log_every": f"{max(1, steps // 200)} steps",
            "execution.workers": settings.workers,
            "execution.keep": 1,
        }
    )
    folder = _folder(settings.out, row.name, seed)
    about = {"recipe": f"ablation {plan.table}: {row.name}", "data": plan.data}
    result = train(config, source, folder, device=device, about=about, evaluations=[evaluation])
    if not result.finished:
        return None
    return _outcome(folder, config.head.prototypes, result.measured)


def _outcome(run: Path, prototypes: int, measured: dict[str, float]) -> Outcome:
    """The result of a finished run: a collapse is read from the end of its metrics."""
    lines = [line for line in read_metrics(run) if "loss" in line][-LINES:]
    names = ("teacher_entropy", "kl", "target_spread", "feature_std", "effective_rank")
    means = {
        name: statistics.fmean(values)
        for name in names
        if (values := [line[name] for line in lines if line.get(name) is not None])
    }
    monitor = CollapseMonitor(prototypes, patience=1)
    monitor.update(*(means.get(name, math.nan) for name in names[:3]))
    return Outcome(next(reversed(measured.values())), monitor.collapse or "", means)


# ------------------------------------------------------------------------------- results
def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's coefficient; equal values share their mean rank.

    NaN for fewer than three pairs, and where one side has a single value.
    """
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _summary(found: Table, outcomes: dict[int, list[Outcome]]) -> list[dict[str, Any]]:
    """One entry a row: mean, standard deviation and collapses over its seeds."""
    rows = []
    for index, row in enumerate(found.rows):
        values = [outcome.knn for outcome in outcomes[index]]
        if not values:
            continue
        names = [outcome.collapse for outcome in outcomes[index] if outcome.collapse]
        rows.append(
            {
                "name": row.name,
                "settings": row.settings,
                "paper": row.paper,
                "knn": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": [asdict(outcome) for outcome in outcomes[index]],
                "collapses_in_paper": row.collapses,
                "collapse": ", ".join(dict.fromkeys(names)),
                "collapsed_seeds": len(names),
            }
        )
    return rows


def _print(out: Path, content: dict[str, Any]) -> None:
    cells = {row["name"]: row_cells(row) for row in content["rows"]}
    console = Console()
    console.print(number_table(content["title"], columns(content), cells))
    if content["rank_correlation"] is not None:
        value = content["rank_correlation"]
        console.print(f"rank correlation with the paper (Spearman): {value:.2f}")
    for name in ("results.json", "page.html"):
        print_path(out / name)


def _write(
    settings: AblationSettings,
    plan: Plan,
    found: Table,
    outcomes: dict[int, list[Outcome]],
    device: str,
) -> dict[str, Any]:
    """Write results.json, page.html and chart.svg of the runs so far; returns the first."""
    rows = _summary(found, outcomes)
    options: dict[str, Any] = {"data": settings.data, "val": settings.val}
    options["budget"] = settings.budget
    options |= {"seeds": plan.seeds, "out": settings.out}
    words = (w for name, x in options.items() if x is not None for w in (f"--{name}", str(x)))
    pairs = [(row["paper"], row["knn"]) for row in rows if row["paper"] is not None]
    content = {
        "table": plan.table,
        "title": found.title,
        "note": found.note,
        "paper_measure": found.measure,
        "network": _described(NETWORKS[plan.network]),
        "device": device,
        "versions": versions(),
        "command": shlex.join(["dino", "ablate", plan.table, *words]),
        "seeds": plan.seeds,
        "images": plan.images,
        "speeds": dict(zip((row.name for row in found.rows), plan.speeds, strict=True)),
        "rank_correlation": rank_correlation(pairs),
        "rows": rows,
    }
    content = finite_json(content)
    lines = {row["name"]: read_metrics(_folder(settings.out, row["name"], 0)) for row in rows}
    drawing, text = ablation_page(content, lines)
    atomic_json(settings.out / "results.json", content)
    atomic_write(settings.out / "chart.svg", drawing)
    atomic_write(settings.out / "page.html", text)
    return content


def _folder(out: Path, row: str, seed: int) -> Path:
    return out / file_name(row) / f"seed-{seed}"


# ------------------------------------------------------------------------------- dino ablate list
def list_tables() -> None:
    """`dino ablate list`: the tables, and how long they take on this machine.

    The smallest network is timed for some seconds on the images of the demo.
    """
    device = pick_device("auto")
    with process_group(device) as ranks:
        console = Console(stderr=True, quiet=not ranks.main)
        with console.status("timing the smallest network"):
            source = open_source("demo")
            first = TABLES["table7"].rows[0]
            found = timed_network(configuration(NETWORKS[0], first, 0), source, device, ranks)
    rows = {
        name: (
            value.title,
            str(len(value.rows)),
            duration(3 * len(value.rows) * (USEFUL_IMAGES / max(found.speed, 1e-9) + RUN_SECONDS)),
        )
        for name, value in TABLES.items()
    }
    result = number_table(
        f"3 seeds of {USEFUL_IMAGES:,.0f} images a run, smallest network, {describe(device)}",
        ["TABLE", "what", "rows", "about"],
        rows,
    )
    Console().print(result)
