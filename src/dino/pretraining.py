"""A whole pretraining: train, measure what was learned, show it.

The one place that joins `train`, `evaluate` and `show`, which know nothing of each other.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from dino.data.commands.preview import contact_sheet, make_rows
from dino.data.commands.stats import read_stats
from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.knn import KNN, KNNEvaluation, compare, spread
from dino.evaluate.protocol import Evaluation
from dino.files import UserError, atomic_json, read_json, replacing
from dino.runtime import keep_memory, pick_device, ranks
from dino.show.report import report
from dino.train.cli_arguments import Preview
from dino.train.config import PixelSettings, PretrainConfig
from dino.train.loop import Result, train
from dino.train.recipes import recipe as recipe_named
from dino.train.warm_start import HeadChoice, begin
from dino.weights.load import load

WATCHED = 2_000
"""Images of the bank, and of the queries, that k-NN takes while training."""
COMPARED = 20_000
"""The same for the comparison with the untrained network and raw pixels at the end."""
K = 20
"""Neighbours; the paper's best (section 4.1)."""


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
    name = recipe or ("demo" if isinstance(data, str) and data == "demo" else "small_data")
    config = recipe_named(name) if isinstance(name, str) else name
    config = config.changed(settings or {})
    given = set(settings or {})
    if stats is not None:
        config = measured(config, stats)
        given |= {f"pixels.{setting.name}" for setting in fields(PixelSettings)}
    initial = None
    if init_from is not None:
        config, initial = begin(config, init_from, out, given=given, head=init_head)
    config.check(ranks().world)
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
    chosen = pick_device(device)
    result = train(
        config,
        source,
        out,
        device=chosen,
        about=about,
        evaluations=_evaluations(source, queries),
        initial=initial,
    )
    if ranks().main and result.finished:
        if source.labels is not None:
            _compare(result.run, source, queries, str(chosen))
        report(result.run, device=chosen)
    return result


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


def _compare(run: Path, source: Source, queries: Source | None, device: str) -> None:
    """k-NN of the trained network, the untrained one and raw pixels into `results.json`."""
    path = run / "results.json"
    step = (run / "checkpoints" / "LAST").read_text().strip()
    if path.exists() and read_json(path).get("checkpoint") == step:
        return
    bank = spread(source, COMPARED)
    asked = None if queries is None else spread(queries, COMPARED)
    settings = KNN(weights=str(run), data="", k=(K,), baseline=True, device=device, workers=0)
    scores, counted = compare(load(run, device), bank, asked, settings=settings)
    rows = {name: next(iter(by_k.values())).top1 for name, by_k in scores.items()}
    sizes = {
        "k": next(iter(scores["trained"])),
        **counted,
        "leave_one_out": asked is None,
    }
    atomic_json(path, {"checkpoint": step, "knn": {**rows, **sizes}})


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
    ending = settings.out.suffix.lower()
    if ending not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"a sheet goes into a .png, .jpg or .webp file, not {settings.out.name}")
    config = config if settings.stats is None else measured(config, settings.stats)
    config.pixels.check()
    source = open_source(settings.data, config.pixels.format)
    rows, skipped = make_rows(
        source,
        config.views.specs(),
        config.pixels.mean,
        config.pixels.std,
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
        sheet = contact_sheet(rows, title)
        sheet.save(file, Image.registered_extensions()[ending])
    return settings.out


def tell(result: Result) -> None:
    """The table and the paths that end `dino pretrain`."""
    console = Console()
    path = result.run / "results.json"
    if path.exists():
        console.print(_table(read_json(path)["knn"]))
    if result.refused:
        console.print(f"{result.refused} steps were refused: {result.run / 'refused.jsonl'}")
    if result.finished:
        console.print(f"weights  {result.run / 'teacher.safetensors'}", soft_wrap=True)
        console.print(f"report   {result.run / 'report.html'}", soft_wrap=True)


def _table(knn: dict[str, Any]) -> Table:
    how = "leave-one-out" if knn["leave_one_out"] else f"{knn['queries']:,} images"
    table = Table(title=f"k-NN accuracy, k = {knn['k']}, {how}, bank of {knn['bank']:,}")
    table.add_column("features")
    table.add_column("top-1 %", justify="right")
    table.add_column("trained network stands", justify="right")
    for row, name in (
        ("trained", "trained, without labels"),
        ("untrained", "same network, untrained"),
        ("pixels", "raw pixels"),
    ):
        lead = "" if row == "trained" else f"{knn['trained'] - knn[row]:+.1f} points"
        table.add_row(name, f"{knn[row]:.1f}", lead)
    return table
