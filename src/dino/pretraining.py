"""`dino pretrain`: joins `train`, `evaluate` and `show`, which do not import each other."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from PIL import Image

from dino.data.commands.preview import make_rows, preview_sheet
from dino.data.commands.stats import read_stats
from dino.data.sources.folder import use_splits
from dino.data.sources.open import Source, open_source
from dino.evaluate.classification.knn import KNN, KNNEvaluation, compare, spread
from dino.evaluate.classification.knn_classifier import standard_error
from dino.features.cache import versions
from dino.features.command import number_table
from dino.files import (
    UserError,
    as_path,
    atomic_json,
    check_output,
    check_outside,
    disk_errors,
    naming,
    read_json,
    replacing,
)
from dino.progress import Console
from dino.rendezvous import reported_failures
from dino.runtime import (
    default_workers,
    describe,
    gather_objects,
    keep_memory,
    pick_device,
    process_group,
    ranks,
    require_same,
    same_errors,
)
from dino.settings import conform, parsed, validated
from dino.show.report.report import report
from dino.show.report.run_contents import Run
from dino.show.report.snapshots import take
from dino.train.cli_arguments import Preview
from dino.train.config import PixelSettings, PretrainConfig, setting_names
from dino.train.loop import Result, train
from dino.train.planning.budget import (
    DEFAULT,
    Budget,
    chosen,
    duration,
    ladder,
    parse,
    resumed,
    timed,
)
from dino.train.planning.introduction import duration as describe_time
from dino.train.recipes import RECIPES
from dino.train.recipes import recipe as recipe_named
from dino.train.sessions import Session
from dino.train.warm_start import HeadChoice, begin
from dino.weights.checkpoint import last_step
from dino.weights.load import load

TRAINING_IMAGES, FINAL_IMAGES = 2_000, 20_000
"""Most images of the bank, and of the queries, for k-NN while training and at the end."""
REFRESH = 60
"""Seconds after which a browser loads the page of a run that goes on again."""
K = 20
"""Neighbours; the paper's best (section 4.1)."""


@reported_failures()
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
    dry_run: bool = False,
    command: str | None = None,
    budget: str | None = None,
) -> Result:
    """Pretrain on images; a run folder that holds a checkpoint is resumed.

    Where the images have classes (sub-folders), k-NN is measured on the way, and at the end beside
    the untrained network and raw pixels. Labels are never trained on.

    Args:
        recipe: name of a recipe or a configuration. Without one, the demo has `demo`; other images
            have a budget of an hour, or `small_data` where `init_from` or a duration is given.
        data: a folder, list, shards, array, `demo`, or any data set of images: whatever
            `dino.data.sources.open.open_source` takes. A folder with `train` and `val` in it
            trains on the one and measures on the other, and never reads `test`.
        out: the run folder.
        val: labelled images to measure k-NN on; by default each training image is compared with
            all others.
        device: auto, cpu, cuda, cuda:N or mps.
        settings: settings to change, for example `{"optim.lr": 1e-3, "run.batch": 64}`; names may
            have dashes, as on the command line.
        stats: a file of `dino data stats`: channels, their range, means and deviations.
        init_from: weights to start from instead of random ones: whatever `dino.load` takes.
            They decide the architecture, mean and deviation of the pixels, and the head if they
            have one; of `settings`, those that contradict them are refused.
        init_head: "auto" trains the head of `init_from` on if there is one; "new" trains a new one,
            during whose warm-up the backbone is frozen (`optim.freeze_backbone`).
        recipe_name: name of a configuration in `config.json`.
        dry_run: print the expected time and memory, and write and train nothing.
        command: the command line, for the report; by default the call of this function.
        budget: the time that the run may take, such as "2h" or "90min". Without a recipe, network
            and settings are chosen from what is timed on this machine with these images
            (`train.planning.budget`); a resumed run keeps them. "+2h" trains on one that had one.

    Returns:
        How the run ended: `result.backbone()` is the trained network, `result.metrics()` its
        curves, `result.report` the page, which is written anew at each checkpoint.

    Raises:
        UserError: for any mistake in the settings, the data or the folder, in one sentence.
    """
    started = monotonic()
    keep_memory()
    call = {"recipe": recipe, "data": data, "out": out, "val": val, "settings": settings}
    call |= {"stats": stats, "init_from": init_from, "budget": budget}
    conform(init_head, HeadChoice, "init_head")
    if not isinstance(recipe, PretrainConfig):
        conform(recipe, str | None, "recipe")
    check_output(out, folder=True, option="out")
    for argument, value in {"stats": stats, "init_from": init_from}.items():
        if value is not None:
            as_path(value, argument)
    demo = isinstance(data, str) and data == "demo"
    name = recipe or ("demo" if demo else "small_data")
    named = val is not None
    if demo and val is None:
        val = "demo:test"
    else:
        data, val = use_splits(data, val)
    for images in (data, val):
        check_outside(out, images, "out")
    settings = setting_names(conform(settings, dict[str, Any] | None, "settings") or {})
    if ranks().world > 1:
        _compare_calls(recipe, out, budget, device)
    given = set(settings)
    config = recipe_named(name) if isinstance(name, str) else name
    if budget is not None and "run.duration" in given:
        raise UserError("--budget is the duration of the run: give no other")
    if budget is not None and recipe is not None:
        config = config.changed({"run.duration": duration(out, parse(budget))})
    elif budget is not None or chooses_network(recipe, data, init_from, given):
        if init_from is not None:
            raise UserError(
                "--init-from decides the network, so --budget cannot: name a recipe, such as "
                f"dino pretrain small_data --budget {budget}"
            )
        time = parse(budget or DEFAULT)
        before = resumed(out, None if budget is None else time)
        if before is None and budget is None and ranks().main:
            said = f"a budget of {DEFAULT}, since no recipe and no --budget is given"
            Console(stderr=True).print(said, soft_wrap=True)
        config, name = before or (
            _chosen(time, data, out, settings, stats, pick_device(device), started),
            "budget",
        )
    config = validated(config.changed(settings))
    config = measured(config, stats)
    if stats is not None:
        given |= {f"pixels.{setting.name}" for setting in fields(PixelSettings)}
    initial = None
    if init_from is not None:
        config, initial = begin(config, init_from, out, given=given, head=init_head)
    config = config.for_architecture(given)
    config.check()
    chosen = pick_device(device)
    source = open_source(data, config.pixels.format)
    queries = None if val is None else open_source(val, config.pixels.format)
    if queries is not None and (source.labels is None or queries.labels is None):
        if named:
            raise UserError("k-NN on --val needs classes: sub-folders in both --data and --val")
        val = queries = None
    about = {
        "recipe": name if isinstance(name, str) else recipe_name,
        "data": _description(data),
        "val": None if val is None else _description(val),
        **({} if initial is None else initial.defining()),
    }
    evaluations = []
    if source.labels is not None:
        evaluations = [KNNEvaluation(source, queries, k=(10, K), limit=TRAINING_IMAGES)]
    with naming(out), process_group(chosen) as current:
        require_same({"image of --val": None if queries is None else queries.digest()})
        world = f" x {current.world}" if current.world > 1 else ""
        origin = {
            "command": command or _call(call),
            "machine": f"{platform.node()}: {describe(chosen)}{world}",
            "versions": versions(),
            "changed": _changed(config, about["recipe"]),
        }
        page = _Page(out, origin)
        result = train(
            config,
            source,
            out,
            device=chosen,
            about=about,
            evaluations=evaluations,
            initial=initial,
            evaluated_after=_compared(source, queries),
            started=started,
            dry_run=dry_run,
            after_checkpoint=page.after_checkpoint,
        )
        if dry_run:
            return result
        if result.finished and source.labels is not None:
            with _after_training("the comparison with the untrained network", "evaluate knn"):
                _compare(result.run, source, queries, chosen, config.execution.workers)
    if current.main:
        with _after_training("the report", "report"):
            report(result.run, device=chosen, images=result.finished)
    return result


def _compare_calls(recipe: object, out: str | Path, budget: str | None, device: str) -> None:
    """Refuse ranks that would not do the same before the training: choose a network, or resume."""
    with process_group(pick_device(device)):
        with same_errors():
            last = last_step(Path(out) / "checkpoints")
        name = recipe if isinstance(recipe, str) else type(recipe).__name__
        step = None if last is None else last.name
        require_same({"recipe": name, "budget": budget, "checkpoint": step})


def chooses_network(
    recipe: object, data: object, init_from: object, given: Collection[str]
) -> bool:
    """Whether a run without a budget gets the default one: nothing says what to train, or how long.

    Args:
        recipe: as for `pretrain`.
        data: as for `pretrain`.
        init_from: as for `pretrain`.
        given: names of the settings that are given.
    """
    demo = isinstance(data, str) and data == "demo"
    return recipe is None and not demo and init_from is None and "run.duration" not in given


def _chosen(
    budget: Budget,
    data: Any,
    out: str | Path,
    settings: dict[str, Any],
    stats: str | Path | None,
    device: torch.device,
    started: float,
) -> PretrainConfig:
    """The configuration that suits the budget, from networks that are timed; prints the table."""

    def configured(config: PretrainConfig) -> PretrainConfig:
        config = measured(validated(config.changed(settings)), stats)
        config = config.for_architecture(set(settings))
        config.check()
        return config

    source = open_source(data, configured(ladder(1)[0]).pixels.format)
    with process_group(device) as current:
        console = Console(stderr=True, quiet=not current.main)
        networks = ladder(len(source), current.world, device.type)
        with console.status("timing networks"):
            left = budget.seconds - (monotonic() - started)
            found = timed([*map(configured, networks)], source, device, current, left)
        left = budget.seconds - (monotonic() - started)
        config, why = chosen(found, len(source), left, budget)
    rows = {
        candidate.name: (
            f"{candidate.speed:,.0f}" if candidate.speed else "-",
            f"{candidate.speed * left / len(source):,.0f}" if candidate.speed else "-",
            f"{candidate.memory / 2**30:.1f}" if candidate.speed else "does not fit",
        )
        for candidate in found
    }
    columns = ["network", "images/s", f"epochs in {describe_time(left)}", "memory, GiB"]
    console.print(number_table("Networks timed with these images", columns, rows))
    console.print(f"chosen: {why}", soft_wrap=True)
    return config


class _Paced:
    """Work that takes at most a hundredth of the time, and is left out where it would take more."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, work: Callable[[], object]) -> None:
        if (started := monotonic()) >= self._next:
            work()
            ended = monotonic()
            self._next = ended + 99 * (ended - started)


class _Page:
    """`report.html`, `snapshots` and `sessions.json` while training, written by the main rank.

    Args:
        run: the run folder.
        origin: of `train.sessions.Session`.
    """

    def __init__(self, run: str | Path, origin: dict[str, Any]) -> None:
        self.run, self.session = Path(run), Session(run, origin)
        self._page, self._snapshot, self._failed = _Paced(), _Paced(), False

    def after_checkpoint(self, step: int) -> None:
        """Write all, page and snapshot in 1 % of the time each; no failure stops the run."""
        if self._failed:
            return
        self._failed = True
        with _after_training("the report", "report"):
            self.session.save(step)
            import sklearn.decomposition  # noqa: F401 (seconds once, which the last page takes too)

            self._snapshot(self._take_snapshot)
            self._page(lambda: report(self.run, images=False, refresh=REFRESH))
            self._failed = False

    def _take_snapshot(self) -> None:
        newest = last_step(self.run / "checkpoints")
        with suppress(UserError):  # images that cannot be opened by name: the page says so at last
            if newest is not None:
                take(Run(self.run), newest)


def _call(arguments: dict[str, Any]) -> str:
    """The call of `pretrain`, as it can be written; objects that cannot are named by their type."""
    words = {
        name: repr(str(value) if isinstance(value, Path) else value)
        if isinstance(value, (str, Path, dict))
        else f"<{type(value).__name__}>"
        for name, value in arguments.items()
        if value is not None
    }
    return f"dino.pretrain({', '.join(f'{name}={word}' for name, word in words.items())})"


def _changed(config: PretrainConfig, recipe: str) -> dict[str, list[Any]] | None:
    """The settings that differ from the recipe, each with its value there and here."""
    if recipe not in RECIPES:
        return None
    before, now = recipe_named(recipe).flat(), config.flat()
    return {name: [before[name], now[name]] for name in now if before[name] != now[name]}


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


def measured(config: PretrainConfig, stats: str | Path | None) -> PretrainConfig:
    """A configuration with the pixels that `dino data stats` found; as it is without `stats`.

    Raises:
        UserError: if the file is another, or contradicts the configuration.
    """
    if stats is None:
        return config
    found = read_stats(stats).settings()
    for name, value in found.items():
        present = getattr(config.pixels, name)
        if present not in (value, getattr(PixelSettings(), name)):
            raise UserError(
                f"pixels.{name} is {present}, and {value} in {stats}: give either --stats or "
                "--pixels.*"
            )
    return replace(config, pixels=PixelSettings(**found))


def _description(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


@dataclass(frozen=True)
class Comparison:
    """`results.json`: k-NN top-1 accuracies in percent, and numbers of images."""

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


def _compared(source: Source, queries: Source | None) -> int:
    """Images that the comparison passes through the trained and the untrained network."""
    if source.labels is None:
        return 0
    sources = [source] if queries is None else [source, queries]
    return 2 * sum(min(len(images), FINAL_IMAGES) for images in sources)


def _compare(
    run: Path, source: Source, queries: Source | None, device: torch.device, workers: int | None
) -> None:
    """Measure the newest checkpoint and write `results.json`; all ranks share the work."""
    step = last_step(run / "checkpoints")
    earlier = gather_objects(_comparison(run))[0]
    if step is None or (earlier is not None and earlier.checkpoint == step.name):
        return
    workers = default_workers() if workers is None else workers
    settings = KNN(
        weights=str(run), data="", k=(K,), baseline=True, device=str(device), workers=workers
    )
    images = spread(source, FINAL_IMAGES), queries and spread(queries, FINAL_IMAGES)
    scores, sizes = compare(load(run, device), *images, settings=settings)
    (k,) = scores["trained"]  # fewer than K in a small bank
    knn = {name: by_k[k].top1 for name, by_k in scores.items()}
    knn |= {"k": k, **sizes, "leave_one_out": queries is None}
    if ranks().main:
        atomic_json(run / "results.json", {"checkpoint": step.name, "knn": knn})


def preview(settings: Preview, config: PretrainConfig, recipe_name: str) -> Path:
    """`dino data preview`: write the contact sheet of a recipe's views; returns its path.

    Args:
        settings: of the command.
        config: of the views and pixels.
        recipe_name: for the title of the sheet.

    Raises:
        UserError: for a mistake in the settings or the data, in one sentence.
    """
    check_output(settings.out, (".png", ".jpg", ".jpeg", ".webp"))
    check_outside(settings.out, settings.data)
    config = measured(validated(config), settings.stats)
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
        f"Views of recipe {recipe_name}, epoch {settings.epoch}, seed {settings.seed}. Left: the "
        "image with the crops. Below each view: width x height of its crop, and its left and top, "
        "in pixels of the image; then what was done to it, in this order."
    )
    with replacing(settings.out) as temporary, temporary.open("wb") as file:
        sheet = preview_sheet(rows, title)
        sheet.save(file, Image.registered_extensions()[settings.out.suffix.lower()])
    return settings.out


def print_result(result: Result) -> None:
    """Print the table and the paths that end `dino pretrain`."""
    console = Console()
    if (found := _comparison(result.run)) is not None:
        images = "leave-one-out" if found.leave_one_out else f"{found.queries:,} images"
        title = f"k-NN accuracy, k = {found.k}, {images}, bank of {found.bank:,}"

        def percent(top1: float) -> str:
            return f"{top1:.1f} ± {standard_error(top1, found.queries):.1f}"

        rows = {"trained, without labels": (percent(found.trained), "")}
        others = {"same network, untrained": found.untrained, "raw pixels": found.pixels}
        for name, top1 in others.items():
            rows[name] = percent(top1), f"{found.trained - top1:+.1f} points"
        console.print(
            number_table(title, ["features", "top-1 %", "lead of the trained network"], rows)
        )
    if result.refused:
        console.print(f"{result.refused} steps were refused: {result.run / 'refused.jsonl'}")
    if result.finished:
        console.print(f"weights  {result.run / 'teacher.safetensors'}", soft_wrap=True)
        console.print(f"report   {result.run / 'report.html'}", soft_wrap=True)
