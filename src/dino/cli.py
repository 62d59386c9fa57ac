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
from typing import Any, NamedTuple, NoReturn

from dino import __version__
from dino.files import UserError, disk_errors
from dino.settings import validated

INTERRUPTED = 130
"""Exit status after Ctrl-C, and of a run that a signal stopped before its end."""


class Command(NamedTuple):
    """A sub-command, with its line in `--help`.

    Attributes:
        target: "module:Settings:run" without "dino.", where `run` is called with the `Settings`
            from the command line; or "module:run", called with the arguments.
        failed: whether the exit status is 1, from the result of `run`.
    """

    summary: str
    target: str
    failed: Callable[[Any], bool] = lambda result: False


class Group(NamedTuple):
    """Sub-commands by name, with the line of the group in `--help`."""

    summary: str
    commands: Mapping[str, Command]


DATA = {
    "check": Command(
        "list images that cannot be used", "data.commands.check:Check:run", lambda c: bool(c.bad)
    ),
    "stats": Command(
        "range, mean and deviation of channels", "data.commands.stats:StatsSettings:run"
    ),
    "preview": Command("show the views that a recipe makes, with their numbers", "cli:preview"),
}
CLASSIFICATION, RETRIEVAL = "evaluate.classification", "evaluate.retrieval"
EVALUATIONS = {
    "knn": Command("weighted nearest neighbours, section 3.2", f"{CLASSIFICATION}.knn:KNN:run"),
    "linear": Command("linear classifiers, appendix F.2", f"{CLASSIFICATION}.linear:Linear:run"),
    "logistic": Command("few labels, appendix A", f"{CLASSIFICATION}.logistic:Logistic:run"),
    "finetune": Command("all weights, section 4.2.3", f"{CLASSIFICATION}.finetune:FineTune:run"),
    "retrieval": Command("same object, section 4.2.1", f"{RETRIEVAL}.retrieval:Retrieval:run"),
    "copies": Command("copies and near duplicates, 4.2.1", f"{RETRIEVAL}.copies:Copies:run"),
    "segmentation": Command(
        "objects from attention and patches, section 4.2.2",
        "evaluate.segmentation.segmentation:Segmentation:run",
    ),
    "video": Command("objects tracked in videos, Table 5", "evaluate.video.video:Video:run"),
}
WEIGHTS = {
    "list": Command("published weights and their accuracies", "weights.commands:List:run_list"),
    "inspect": Command(
        "the content of a file, and whether it can be loaded",
        "weights.commands:Inspect:run_inspect",
    ),
    "convert": Command("write another format", "weights.commands:Convert:run_convert"),
    "fetch": Command("download published files", "weights.commands:Fetch:run_fetch"),
}
COMMANDS: dict[str, Command | Group] = {
    "pretrain": Command("pretrain on unlabelled images", "cli:pretrain"),
    "data": Group("look at images before training", DATA),
    "evaluate": Group("measure features", EVALUATIONS),
    "features": Command("write features to a file", "evaluate.features.export:FeatureSettings:run"),
    "export": Command("write weights for other libraries", "weights.export.command:Export:run"),
    "weights": Group("known and foreign weights", WEIGHTS),
    "report": Command("write the page of a run", "show.report:ReportSettings:run"),
}


# ------------------------------------------------------------------ commands with recipes
def pretrain(arguments: Sequence[str]) -> None:
    """`dino pretrain [RECIPE]`, where the recipe sets the defaults."""
    import tyro

    from dino.train.cli_arguments import Pretrain, given
    from dino.train.recipes import RECIPES, recipe

    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    data_given = any(word.split("=")[0] == "--data" for word in arguments)
    name = named or ("small_data" if data_given else "demo")
    known = "\n".join(
        f"  {key:12}{(function.__doc__ or '').splitlines()[0]}" for key, function in RECIPES.items()
    )
    settings = parse(
        Pretrain,
        f"dino pretrain {named or '[RECIPE]'}",
        arguments[1:] if named else arguments,
        description=f"{Pretrain.__doc__}\n\nRecipes (settings shown are those of {name}):\n{known}",
        default=Pretrain(out=tyro.MISSING, config=recipe(name)),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    from dino import pretraining
    from dino.runtime import ranks

    result = pretraining.pretrain(
        settings.config,
        data=settings.data,
        out=settings.out,
        val=settings.val,
        stats=settings.stats,
        device=settings.device,
        settings=given(arguments, settings.config),
        init_from=settings.init_from,
        init_head=settings.init_head,
        recipe_name=name,
        command=shlex.join(["dino", "pretrain", *arguments]),
    )
    if ranks().main:
        pretraining.print_result(result)
    if not result.finished:
        sys.exit(INTERRUPTED)


def preview(arguments: Sequence[str]) -> None:
    """`dino data preview DATA [RECIPE]`, where the recipe sets the defaults."""
    import tyro

    from dino.train.cli_arguments import Preview
    from dino.train.recipes import RECIPES, recipe

    words = list(arguments)
    named = words.pop(1) if len(words) > 1 and not any(w.startswith("-") for w in words[:2]) else ""
    name = named or "small_data"
    config = recipe(name)
    settings = parse(
        Preview,
        f"dino data preview DATA {named or '[RECIPE]'}",
        words,
        description=f"{Preview.__doc__}\n\nRecipes: {', '.join(RECIPES)}; by default small_data.",
        default=Preview(data=tyro.MISSING, views=config.views, pixels=config.pixels),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    from dino import pretraining

    config = replace(config, views=settings.views, pixels=settings.pixels)
    print(pretraining.preview(validated(settings), config, name))


# ------------------------------------------------------------------ parsing
def parse(settings: Any, prog: str, arguments: Sequence[str], **options: Any) -> Any:
    """The dataclass `settings` from a command line; tyro explains wrong options (exit 2).

    Raises:
        UserError: for a key of `settings.renamed`, the new names of former options.
    """
    import tyro

    def plain(option: str) -> str:
        return option.lstrip("-").replace("_", "-")

    renamed = {plain(old): plain(new) for old, new in getattr(settings, "renamed", {}).items()}
    for word in arguments:
        option = plain(word.split("=")[0])
        if word.startswith("--") and option in renamed:
            raise UserError(f"{prog}: --{option} is called --{renamed[option]} now")
    return tyro.cli(settings, prog=prog, args=list(arguments), **options)


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
    if command.failed(found[-1](settings)):
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
        os._exit(status)  # the other ranks may be waiting for this one: the launcher ends them
    sys.exit(status)
