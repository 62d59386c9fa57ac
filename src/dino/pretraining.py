"""A whole pretraining: train, measure what was learned, show it.

The one place that joins `train`, `evaluate` and `show`, which know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from dino.data.commands.preview import make_rows, preview_sheet
from dino.data.commands.stats import read_stats
from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.knn import KNN, KNNEvaluation, compare, spread
from dino.evaluate.protocol import Evaluation
from dino.files import (
    UserError,
    as_path,
    atomic_json,
    check_output,
    disk_errors,
    naming,
    read_json,
    replacing,
)
from dino.progress import Console
from dino.runtime import (
    default_workers,
    gather_objects,
    keep_memory,
    pick_device,
    process_group,
    ranks,
)
from dino.settings import conform, parsed, validated
from dino.show.report import report
from dino.train.build import for_architecture
from dino.train.cli_arguments import Preview
from dino.train.config import PixelSettings, PretrainConfig
from dino.train.loop import Result, train
from dino.train.recipes import recipe as recipe_named
from dino.train.warm_start import HeadChoice, begin
from dino.weights.checkpoint import last_step
from dino.weights.load import load

WATCHED = 2_000
"""Images of the bank, and of the queries, that k-NN takes while training."""
COMPARED = 20_000
"""The same for the comparison with the untrained network and raw pixels at the end."""
K = 20
"""Neighbours; the paper's best (section 4.1)."""


@disk_errors()
def pretrain(
    recipe: str | PretrainConfig | None = None,
    *,
    data: Any = "demo",
    out: str | Path,
    val: Any = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
    stats: str | Path | None = None,
    init_from: str | Path | None = None,
    init_head: HeadChoice = "auto",
    recipe_name: str = "own",
) -> Result:
    """Pretrain on images; a run folder that holds a checkpoint is resumed.

    Where the images have classes (sub-folders), k-NN is measured on the way, and at the end beside
    the untrained network and raw pixels. Labels are never trained on.

    Args:
        recipe: name of a recipe or a configuration; by default `small_data`, for the demo `demo`.
        data: a folder, list, shards, array, `demo`, or any data set of images: whatever
            `dino.data.sources.open.open_source` takes. A folder with `train` and `val` in it
            trains on the one and measures on the other, and never reads `test`.
        out: the run folder.
        val: labelled images to measure k-NN on; by default each training image is held against
            all others.
        device: auto, cpu, cuda, cuda:N or mps.
        settings: settings to change, for example `{"optim.lr": 1e-3, "run.batch": 64}`.
        stats: a file of `dino data stats`: channels, their range, means and deviations.
        init_from: weights to begin with instead of random numbers: whatever `dino.load` takes.
            They decide the architecture, mean and deviation of the pixels, and the head if they
            have one; of `settings`, those that contradict them are refused.
        init_head: "auto" takes the head along if there is one; "new" trains a new one, which the
            backbone waits for (`optim.freeze_backbone`).
        recipe_name: what to call a configuration in the record.

    Returns:
        How the run ended; its folder then holds `teacher.safetensors`, `metrics.jsonl` and
        `report.html`.

    Raises:
        UserError: for any mistake in the settings, the data or the folder, in one sentence.
    """
    keep_memory()
    conform(init_head, HeadChoice, "init_head")
    if not isinstance(recipe, PretrainConfig):
        conform(recipe, str | None, "recipe")
    check_output(out, folder=True, option="out")
    for argument, value in {"stats": stats, "init_from": init_from}.items():
        if value is not None:
            as_path(value, argument)
    name = recipe or ("demo" if isinstance(data, str) and data == "demo" else "small_data")
    given = set(conform(settings, dict[str, Any] | None, "settings") or {})
    config = recipe_named(name) if isinstance(name, str) else name
    config = validated(config.changed(settings or {}))
    if stats is not None:
        config = measured(config, stats)
        given |= {f"pixels.{setting.name}" for setting in fields(PixelSettings)}
    initial = None
    if init_from is not None:
        config, initial = begin(config, init_from, out, given=given, head=init_head)
    config = for_architecture(config, given)
    config.check(ranks().world)
    chosen = pick_device(device)
    named = val is not None
    data, val = _split(data, val)
    source = open_source(data, config.pixels.format)
    queries = None if val is None else open_source(val, config.pixels.format)
    if queries is not None and (source.labels is None or queries.labels is None):
        if named:
            raise UserError("k-NN on --val needs classes: sub-folders in both --data and --val")
        val = queries = None
    about = {
        "recipe": name if isinstance(name, str) else recipe_name,
        "data": _called(data),
        "val": None if val is None else _called(val),
        **({} if initial is None else initial.defining()),
    }
    with naming(out), process_group(chosen) as here:
        result = train(
            config,
            source,
            out,
            device=chosen,
            about=about,
            evaluations=_evaluations(source, queries),
            initial=initial,
        )
        if result.finished and source.labels is not None:
            with _after_training("the comparison with the untrained network", "evaluate knn"):
                _compare(result.run, source, queries, chosen, config.execution.workers)
    if here.main and result.finished:
        with _after_training("the report", "report"):
            report(result.run, device=chosen)
    return result


@contextmanager
def _after_training(what: str, command: str) -> Iterator[None]:
    """Let no failure of the body fail a run whose weights are saved: it becomes a warning."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        Console(stderr=True).print(
            f"warning: {what} failed ({reason}); the weights are saved: try 'dino {command}'",
            style="yellow",
            soft_wrap=True,
        )


def measured(config: PretrainConfig, stats: str | Path) -> PretrainConfig:
    """A configuration with the pixels that `dino data stats` found.

    Raises:
        UserError: if the file is another, or the configuration says otherwise itself.
    """
    found, usual = read_stats(stats).settings(), PixelSettings()
    for name, value in found.items():
        own = getattr(config.pixels, name)
        if own not in (value, getattr(usual, name)):
            raise UserError(
                f"pixels.{name} is {own}, and {value} in {stats}: give either --stats or --pixels.*"
            )
    return replace(config, pixels=PixelSettings(**found))


def _split(data: Any, val: Any) -> tuple[Any, Any]:
    """Training images and images to measure on, where one name stands for both."""
    if isinstance(data, str) and data == "demo" and val is None:
        return "demo", "demo:test"
    return use_splits(data, val)


def _called(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


def _evaluations(source: Source, queries: Source | None) -> list[Evaluation]:
    if source.labels is None:
        return []
    return [KNNEvaluation(source, queries, k=(10, K), limit=WATCHED)]


@dataclass(frozen=True)
class Comparison:
    """`results.json`: k-NN of a trained network, its untrained twin and raw pixels.

    Attributes:
        checkpoint: the step that was measured.
        trained, untrained, pixels: top-1 accuracy in percent.
        k: neighbours.
        bank, queries, skipped: numbers of images.
        leave_one_out: whether the queries are the bank itself.
    """

    checkpoint: str
    trained: float
    untrained: float
    pixels: float
    k: int
    bank: int
    queries: int
    skipped: int
    leave_one_out: bool


def _comparison(run: Path) -> Comparison | None:
    """What `results.json` holds; None if there is none that can be read."""
    path = run / "results.json"
    try:
        content = read_json(path)
        return parsed(Comparison, {"checkpoint": content["checkpoint"], **content["knn"]}, path)
    except (UserError, KeyError, TypeError):
        return None


def _compare(
    run: Path, source: Source, queries: Source | None, device: torch.device, workers: int | None
) -> None:
    """Measure the newest checkpoint and write `results.json`; all ranks share the work."""
    step = last_step(run / "checkpoints")
    earlier = gather_objects(_comparison(run))[0]
    if step is None or (earlier is not None and earlier.checkpoint == step.name):
        return
    bank = spread(source, COMPARED)
    asked = None if queries is None else spread(queries, COMPARED)
    settings = KNN(
        weights=str(run),
        data="",
        k=(K,),
        baseline=True,
        device=str(device),
        workers=default_workers() if workers is None else workers,
    )
    scores, counted = compare(load(run, device), bank, asked, settings=settings)
    rows = {name: next(iter(by_k.values())).top1 for name, by_k in scores.items()}
    sizes = {"k": next(iter(scores["trained"])), **counted, "leave_one_out": asked is None}
    if ranks().main:
        atomic_json(run / "results.json", {"checkpoint": step.name, "knn": {**rows, **sizes}})


def preview(settings: Preview, config: PretrainConfig, recipe_name: str) -> Path:
    """`dino data preview`: write the contact sheet of a recipe's views.

    Args:
        settings: of the command.
        config: whose views and pixels are shown.
        recipe_name: what to call it on the sheet.

    Returns:
        The picture.

    Raises:
        UserError: for a mistake in the settings or the data, in one sentence.
    """
    check_output(settings.out, (".png", ".jpg", ".jpeg", ".webp"))
    config = validated(config)
    config = config if settings.stats is None else measured(config, settings.stats)
    config.pixels.check()
    source = open_source(settings.data, config.pixels.format)
    rows, skipped = make_rows(
        source,
        config.views.specs(),
        images=settings.images,
        epoch=settings.epoch,
        seed=settings.seed,
    )
    for error in skipped:
        Console(stderr=True).print(f"{error}; another took its place", style="yellow")
    title = (
        f"{recipe_name}, epoch {settings.epoch}, seed {settings.seed}. Crops: width x height at "
        "left, top in pixels of the image; then what was done to the view, in this order."
    )
    with replacing(settings.out) as temporary, temporary.open("wb") as file:
        sheet = preview_sheet(rows, title)
        sheet.save(file, Image.registered_extensions()[settings.out.suffix.lower()])
    return settings.out


def tell(result: Result) -> None:
    """Print the table and the paths that end `dino pretrain`."""
    console = Console()
    if (found := _comparison(result.run)) is not None:
        console.print(_table(found))
    if result.refused:
        console.print(f"{result.refused} steps were refused: {result.run / 'refused.jsonl'}")
    if result.finished:
        console.print(f"weights  {result.run / 'teacher.safetensors'}", soft_wrap=True)
        console.print(f"report   {result.run / 'report.html'}", soft_wrap=True)


def _table(found: Comparison) -> Table:
    how = "leave-one-out" if found.leave_one_out else f"{found.queries:,} images"
    table = Table(title=f"k-NN accuracy, k = {found.k}, {how}, bank of {found.bank:,}")
    table.add_column("features")
    table.add_column("top-1 %", justify="right")
    table.add_column("lead of the trained network", justify="right")
    table.add_row("trained, without labels", f"{found.trained:.1f}", "")
    for name, accuracy in (
        ("same network, untrained", found.untrained),
        ("raw pixels", found.pixels),
    ):
        table.add_row(name, f"{accuracy:.1f}", f"{found.trained - accuracy:+.1f} points")
    return table
