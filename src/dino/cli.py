"""The command `dino`: a table of sub-commands, each typed by a dataclass of settings.

Only the chosen sub-command is imported, so that `dino --help` loads no network library.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dino import __version__
from dino.arguments import asks_for_help, parse, split
from dino.files import UserError, disk_errors
from dino.settings import validated

SPINS = "10000"
"""How often a thread of OpenMP looks for work before it sleeps. With the default of GNU's OpenMP,
two threads beside two other busy processes trained half as fast on two cores; without other
processes there was no difference (ResNet-18 at 64 px, and the demo)."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, and of a run that a signal stopped before its end."""


class Command(NamedTuple):
    """A sub-command, with its line in `--help`.

    Attributes:
        target: "module:Settings:run" without "dino.", where `run` is called with the `Settings`
            from the command line; or "module:run", called with the arguments.
        failed: whether the exit status is 1, from the result of `run`.
        after: prints what to do next, from the settings.
    """

    summary: str
    target: str
    failed: Callable[[Any], bool] = lambda result: False
    after: Callable[[Any], None] = lambda settings: None


class Group(NamedTuple):
    """Sub-commands by name, with the line of the group in `--help`."""

    summary: str
    commands: Mapping[str, Command]


# ------------------------------------------------------------------ what to do after a command
def _next(prog: str, *words: Any) -> None:
    """Print the command that follows, to stderr."""
    _note(f"next: {prog} {shlex.join(map(str, words))}")


def _note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _after_evaluation(settings: Any) -> None:
    if (Path(settings.weights) / "config.json").exists():
        _next("dino report", settings.weights)
    else:
        _note("next: 'dino evaluate --help' lists further measures")


def _after_writing_weights(settings: Any) -> None:
    card = settings.out / "README.md"
    if not settings.out.is_dir():
        card = settings.out.with_name(f"{settings.out.name}.MODEL_CARD.md")
    _note(f"next: {card} says how to load the network")


def _after_features(settings: Any) -> None:
    out, parquet = settings.out, settings.out.suffix == ".parquet"
    rows = "" if parquet else f"; its rows are the lines of {out.with_suffix('.csv')}"
    _note(f"next: {'pandas.read_parquet' if parquet else 'numpy.load'}({str(out)!r}){rows}")


def _after_job(settings: Any) -> None:
    if settings.out.is_dir():
        _note(f"next: look into {settings.out}")


def _after_components(settings: Any) -> None:
    if settings.save_basis is None:
        _note(f"next: open {settings.out / 'sheet.png'}")
    else:
        words = ("others/", "--basis", settings.save_basis, "--out", "others-components/")
        _next("dino components", settings.weights, *words)


# ------------------------------------------------------------------ the commands
DATA = {
    "check": Command(
        "list images that cannot be used",
        "data.commands.check:Check:run",
        lambda checked: bool(checked.bad),
        lambda settings: _next("dino data preview", settings.data),
    ),
    "stats": Command(
        "range, mean and deviation of channels",
        "data.commands.stats:StatsSettings:run",
        after=lambda settings: _next(
            *("dino pretrain", settings.data, "--stats", settings.out, "--out", "runs/mine"),
        ),
    ),
    "preview": Command("show the views that a recipe makes, with their numbers", "cli:preview"),
}
EVALUATIONS = {
    name: Command(summary, f"evaluate.{target}:run", after=_after_evaluation)
    for name, summary, target in (
        ("knn", "weighted nearest neighbours, section 3.2", "classification.knn:KNN"),
        ("linear", "linear classifiers, appendix F.2", "classification.linear:Linear"),
        ("logistic", "few labels, appendix A", "classification.logistic:Logistic"),
        ("finetune", "all weights, section 4.2.3", "classification.finetune:FineTune"),
        ("retrieval", "same object, section 4.2.1", "retrieval.retrieval:Retrieval"),
        ("copies", "copies and near duplicates, 4.2.1", "retrieval.copies:Copies"),
        (
            *("segmentation", "objects from attention and patches, section 4.2.2"),
            "segmentation.segmentation:Segmentation",
        ),
        ("video", "objects tracked in videos, Table 5", "video.video:Video"),
    )
}
JOBS = {
    name: Command(summary, f"jobs.{target}:run", after=_after_job)
    for name, summary, target in (
        ("search", "the images most similar to others", "search:Search"),
        ("map", "all images on a plane, as one page", "map:Map"),
        ("duplicates", "copies among the images of a folder", "duplicates:FindDuplicates"),
        ("anomalies", "what looks unlike normal images", "anomalies:Anomalies"),
        ("cluster", "sort images into groups", "cluster:Cluster"),
        ("segment", "masks of all images from a few masks or clicks", "segment:Segment"),
        ("select", "choose images to label or to keep", "select:Select"),
        ("distance", "how far apart two folders are", "distance:Distance"),
    )
}
WEIGHTS = {
    "list": Command(
        "published weights and their accuracies",
        "weights.commands:List:run_list",
        after=lambda settings: _next("dino weights fetch", "dino_vits16"),
    ),
    "inspect": Command(
        "the content of a file, and whether it can be loaded",
        "weights.commands:Inspect:run_inspect",
        after=lambda s: _next("dino features", s.weights, "photos/", "--out", "features.npy"),
    ),
    "convert": Command(
        "write another format",
        "weights.commands:Convert:run_convert",
        after=_after_writing_weights,
    ),
    "fetch": Command(
        "download published files",
        "weights.commands:Fetch:run_fetch",
        after=lambda s: _next("dino weights inspect", s.weights[0]),
    ),
}
COMMANDS: dict[str, Command | Group] = {
    "pretrain": Command("pretrain on unlabelled images", "cli:pretrain"),
    "ablate": Command("train a table of the paper in small", "cli:ablate"),
    "data": Group("look at images before training", DATA),
    "evaluate": Group("measure features", EVALUATIONS),
    **JOBS,
    "features": Command(
        "write features to a file",
        "features.export:FeatureSettings:run",
        after=_after_features,
    ),
    "attention": Command(
        "show what a Vision Transformer attends to",
        "show.attention_maps:AttentionSettings:run",
        after=lambda s: _note(
            f"next: open the pictures in {s.out}; 'dino evaluate segmentation' scores such masks"
        ),
    ),
    "components": Command(
        "show principal components of patch features, and parts",
        "show.components:ComponentSettings:run",
        after=_after_components,
    ),
    "objects": Command(
        "find objects without labels: boxes and masks",
        "evaluate.segmentation.object_discovery:ObjectSettings:run",
        after=lambda s: _note(f"next: open {s.out / 'sheet.png'}"),
    ),
    "explore": Command(
        "a page where similar patches of images light up, and folders are maps",
        "show.explorer.page:ExploreSettings:run",
        after=lambda s: _note(f"next: open {s.out} in a browser") if s.out else None,
    ),
    "export": Command(
        "write weights for other libraries",
        "weights.export.command:Export:run",
        after=_after_writing_weights,
    ),
    "weights": Group("known and foreign weights", WEIGHTS),
    "report": Command(
        "write the page of a run, or compare several",
        "show.report.report:ReportSettings:run",
        after=lambda s: _note(
            f"next: open {s.out or Path(s.weights[0]) / 'report.html'} in a browser"
        ),
    ),
}


# ------------------------------------------------------------------ commands with recipes
def pretrain(arguments: Sequence[str]) -> Any:
    """`dino pretrain [RECIPE] [DATA]`, where the recipe sets the defaults."""
    import tyro

    from dino.train.cli_arguments import Pretrain, given
    from dino.train.recipes import RECIPES, recipe, summary

    named, words = _recipe(Pretrain, "dino pretrain", arguments)
    images = [*words, "--data", "demo"]
    own_images = images[images.index("--data") + 1] != "demo"
    name = named or ("small_data" if own_images else "demo")
    description = f"{Pretrain.__doc__}\n\nRecipes (k-NN / linear top-1 % on ImageNet):\n"
    description += "\n".join(f"  {key:11}{summary(key)}" for key in RECIPES)
    description += f"\n\nThe settings below are those of {name}."
    settings = parse(
        Pretrain,
        f"dino pretrain {named or ''}".strip(),
        words,
        before=[] if named else ["[RECIPE]"],
        description=description,
        default=Pretrain(out=tyro.MISSING, config=recipe(name)),
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = settings.changed()
    chosen = given(arguments, config)
    from dino import pretraining
    from dino.runtime import ranks

    by_budget = named is None and (
        settings.budget is not None
        or pretraining.chooses_network(named, settings.data, settings.init_from, chosen)
    )
    if named is None and not by_budget:
        _say_recipe(name, "dino pretrain")
    result = pretraining.pretrain(
        None if by_budget else config,
        data=settings.data,
        out=settings.out,
        val=settings.val,
        stats=settings.stats,
        device=settings.device,
        settings=chosen,
        init_from=settings.init_from,
        init_head=settings.init_head,
        recipe_name=name,
        budget=settings.budget,
        dry_run=settings.dry_run,
        command=shlex.join(["dino", "pretrain", *arguments]),
    )
    if settings.dry_run:
        return
    if ranks().main:
        pretraining.print_result(result)
    if not result.finished:
        sys.exit(INTERRUPTED)
    _next("dino features", settings.out, settings.data, "--out", "features.npy")


def ablate(arguments: Sequence[str]) -> None:
    """`dino ablate TABLE` and `dino ablate list`."""
    if not arguments:
        raise UserError("which table of the paper? 'dino ablate list' names them")
    from dino import ablation
    from dino.train.ablations import TABLES

    name, *words = arguments
    if name == "list":
        ablation.list_tables()
        return
    tables = "\n".join(f"  {key:11}{found.title}" for key, found in TABLES.items())
    if asks_for_help(arguments):
        name, words = "TABLE", ["--help"]
    settings = parse(
        ablation.AblationSettings,
        f"dino ablate {name}",
        words,
        description=f"{ablation.AblationSettings.__doc__}\n\nTables:\n{tables}\n",
    )
    if not ablation.run(name, settings):
        sys.exit(INTERRUPTED)
    _note(f"next: open {settings.out / 'page.html'} in a browser")


def preview(arguments: Sequence[str]) -> None:
    """`dino data preview [RECIPE] DATA`, where the recipe sets the defaults."""
    import tyro

    from dino.train.cli_arguments import Preview
    from dino.train.recipes import RECIPES, recipe

    named, words = _recipe(Preview, "dino data preview", arguments, alone=False)
    name = named or "laptop"
    config = recipe(name)
    settings = parse(
        Preview,
        f"dino data preview {named or ''}".strip(),
        words,
        before=[] if named else ["[RECIPE]"],
        description=f"{Preview.__doc__}\n\nRecipes: {', '.join(RECIPES)}; by default laptop.",
        default=Preview(data=tyro.MISSING, views=config.views, pixels=config.pixels),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    from dino import pretraining

    config = replace(config, views=settings.views, pixels=settings.pixels)
    print(pretraining.preview(validated(settings), config, name))
    if named is None:
        _say_recipe(name, "dino data preview")
    _next("dino pretrain", *filter(None, [named]), settings.data, "--out", "runs/mine")


def _recipe(
    settings: Any, prog: str, words: Sequence[str], *, alone: bool = True
) -> tuple[str | None, list[str]]:
    """The recipe that the words of a command name, and the words without it."""
    from dino.train.cli_arguments import recipe_and_images
    from dino.train.recipes import RECIPES

    if asks_for_help(words):
        return next((word for word in words if word in RECIPES), None), ["--help"]
    free, given = split(settings, prog, words)
    named, images = recipe_and_images(free, alone=alone or "data" in given)
    if images and "data" not in given:
        given["data"] = ["--data", images.pop(0)]
    return named, [*images, *(word for group in given.values() for word in group)]


def _say_recipe(name: str, prog: str) -> None:
    _note(f"recipe {name}, since none is named; '{prog} --help' lists the others")


# ------------------------------------------------------------------ running
def run(prog: str, commands: Mapping[str, Command | Group], arguments: Sequence[str]) -> None:
    """Run a command, or print help.

    Raises:
        UserError: for an unknown command, or invalid settings.
        SystemExit: with 1 if the command `failed`, 2 if there is none.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(prog, commands))
        if not arguments:
            sys.exit(2)
        return
    name, *rest = arguments
    if name not in commands:
        raise UserError(f"there is no command '{prog} {name}': {_similar(prog, commands, name)}")
    command = commands[name]
    if isinstance(command, Group):
        run(f"{prog} {name}", command.commands, rest)
        return
    module, *names = command.target.split(":")
    found = [getattr(import_module(f"dino.{module}"), attribute) for attribute in names]
    settings = validated(parse(found[0], f"{prog} {name}", rest)) if len(found) == 2 else rest
    result = found[-1](settings)
    command.after(settings)
    if command.failed(result):
        sys.exit(1)


def _similar(prog: str, commands: Mapping[str, Command | Group], name: str) -> str:
    full = {word: f"{prog} {word}" for word in commands}
    for group, found in commands.items():
        if isinstance(found, Group):
            full |= {word: f"{prog} {group} {word}" for word in found.commands}
    near = [f"'{full[word]}'" for word in get_close_matches(name, full, n=2)]
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(commands)}"


def _help(prog: str, commands: Mapping[str, Command | Group]) -> str:
    lines = [f"usage: {prog} COMMAND ...", ""]
    if prog == "dino":
        lines[:0] = [f"dino {__version__}: self-distillation with no labels (arXiv 2104.14294)", ""]
    for name, command in commands.items():
        names = f": {', '.join(command.commands)}" if isinstance(command, Group) else ""
        lines.append(f"  {name:13} {command.summary}{names}")
    return "\n".join([*lines, "", f"'{prog} COMMAND --help' shows the options of a command."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line.

    Raises:
        SystemExit: with 2 and one sentence for a mistake of the user, 130 after Ctrl-C, 141 if the
            reader of the output has ended (`dino --help | head`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    try:
        with disk_errors():
            try:
                if arguments and arguments[0] in ("-V", "--version"):
                    print(f"dino {__version__}")
                else:
                    run("dino", COMMANDS, arguments)
            finally:
                if sys.stdout is not None:  # it is closed by `>&-`
                    sys.stdout.flush()
    except UserError as error:
        _end(2, str(error))
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except BrokenPipeError:
        _end(141)


def _end(status: int, message: str = "") -> NoReturn:
    """Exit without another error from an output that cannot be written."""
    with suppress(OSError):
        if message:
            print(f"dino: {message}", file=sys.stderr, flush=True)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python would flush it again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dino.rendezvous import report_failure

        report_failure(message or "it was interrupted")
        os._exit(status)  # leaving the group could wait for the other ranks
    sys.exit(status)
