"""The command `dino`: one sub-command a job, typed by the job's settings.

Only the chosen job is imported, so that `dino --help` needs no network library. A user's mistake
ends in one sentence and exit status 2, an interruption in 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from dino import __version__
from dino.files import UserError


@dataclass(frozen=True)
class Command:
    """A job: its words for `dino --help`, and what runs it with the remaining arguments."""

    summary: str
    run: Callable[[Sequence[str]], None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the page of a run anew: numbers, curves and pictures."""

    run: str
    """The run folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


# ------------------------------------------------------------------------------------ the jobs
def _pretrain(arguments: Sequence[str]) -> None:
    import tyro

    from dino.train.cli_arguments import Pretrain, given
    from dino.train.recipes import RECIPES, recipe

    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    data_given = any(word.split("=")[0] == "--data" for word in arguments)
    name = named or ("small_data" if data_given else "demo")
    known = "\n".join(
        f"  {key:12}{(function.__doc__ or '').splitlines()[0]}" for key, function in RECIPES.items()
    )
    settings = tyro.cli(
        Pretrain,
        prog=f"dino pretrain {named or '[RECIPE]'}",
        description=f"{Pretrain.__doc__}\n\nRecipes (settings shown are those of {name}):\n{known}",
        args=list(arguments[1:] if named else arguments),
        default=Pretrain(out=tyro.MISSING, config=recipe(name)),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    from dino.pretraining import pretrain, tell
    from dino.runtime import ranks

    result = pretrain(
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
    )
    if ranks().main:
        tell(result)


def _data(arguments: Sequence[str]) -> None:
    _dispatch("dino data", DATA, arguments)


def _data_check(arguments: Sequence[str]) -> None:
    from dino.data.commands.check import Check, run

    if run(_parse(Check, "dino data check", arguments)).bad:
        sys.exit(1)


def _data_stats(arguments: Sequence[str]) -> None:
    from dino.data.commands.stats import StatsSettings, run

    run(_parse(StatsSettings, "dino data stats", arguments))


def _data_preview(arguments: Sequence[str]) -> None:
    from dino.train.cli_arguments import Preview
    from dino.train.recipes import RECIPES, recipe

    words = list(arguments)
    named = words.pop(1) if len(words) > 1 and not any(w.startswith("-") for w in words[:2]) else ""
    config = recipe(named or "small_data")
    import tyro

    settings = tyro.cli(
        Preview,
        prog=f"dino data preview {'DATA ' + named if named else 'DATA [RECIPE]'}",
        description=f"{Preview.__doc__}\n\nRecipes: {', '.join(RECIPES)}; by default small_data.",
        args=words,
        default=Preview(data=tyro.MISSING, views=config.views, pixels=config.pixels),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    from dino.pretraining import preview

    config = replace(config, views=settings.views, pixels=settings.pixels)
    print(preview(settings, config, named or "small_data"))


def _evaluate(arguments: Sequence[str]) -> None:
    _dispatch("dino evaluate", EVALUATIONS, arguments)


def _knn(arguments: Sequence[str]) -> None:
    from dino.evaluate.classification.knn import KNN, run

    run(_parse(KNN, "dino evaluate knn", arguments))


def _linear(arguments: Sequence[str]) -> None:
    from dino.evaluate.classification.linear import Linear, run

    run(_parse(Linear, "dino evaluate linear", arguments))


def _retrieval(arguments: Sequence[str]) -> None:
    from dino.evaluate.retrieval.retrieval import Retrieval, run

    run(_parse(Retrieval, "dino evaluate retrieval", arguments))


def _copies(arguments: Sequence[str]) -> None:
    from dino.evaluate.retrieval.copies import Copies, run

    run(_parse(Copies, "dino evaluate copies", arguments))


def _finetune(arguments: Sequence[str]) -> None:
    from dino.evaluate.classification.finetune import FineTune, run

    run(_parse(FineTune, "dino evaluate finetune", arguments))


def _logistic(arguments: Sequence[str]) -> None:
    from dino.evaluate.classification.logistic import Logistic, run

    run(_parse(Logistic, "dino evaluate logistic", arguments))


def _segmentation(arguments: Sequence[str]) -> None:
    from dino.evaluate.segmentation.segmentation import Segmentation, run

    run(_parse(Segmentation, "dino evaluate segmentation", arguments))


def _video(arguments: Sequence[str]) -> None:
    from dino.evaluate.video.video import Video, run

    run(_parse(Video, "dino evaluate video", arguments))


def _features(arguments: Sequence[str]) -> None:
    from dino.evaluate.features.export import FeatureSettings, run

    run(_parse(FeatureSettings, "dino features", arguments))


def _export(arguments: Sequence[str]) -> None:
    from dino.weights.export.command import Export, run

    run(_parse(Export, "dino export", arguments))


def _weights(arguments: Sequence[str]) -> None:
    _dispatch("dino weights", WEIGHTS, arguments)


def _weights_list(arguments: Sequence[str]) -> None:
    from dino.weights.commands import List, run_list

    run_list(_parse(List, "dino weights list", arguments))


def _weights_inspect(arguments: Sequence[str]) -> None:
    from dino.weights.commands import Inspect, run_inspect

    run_inspect(_parse(Inspect, "dino weights inspect", arguments))


def _weights_convert(arguments: Sequence[str]) -> None:
    from dino.weights.commands import Convert, run_convert

    run_convert(_parse(Convert, "dino weights convert", arguments))


def _weights_fetch(arguments: Sequence[str]) -> None:
    from dino.weights.commands import Fetch, run_fetch

    run_fetch(_parse(Fetch, "dino weights fetch", arguments))


def _report(arguments: Sequence[str]) -> None:
    settings = _parse(Report, "dino report", arguments)
    from dino.runtime import pick_device
    from dino.show.report import report

    print(report(settings.run, device=pick_device(settings.device)))


DATA = {
    "check": Command("find images that cannot be used, and list them", _data_check),
    "stats": Command("measure range, mean and deviation of each channel", _data_stats),
    "preview": Command("show the views that a recipe makes, with their numbers", _data_preview),
}
EVALUATIONS = {
    "knn": Command("weighted nearest neighbours, paper section 3.2", _knn),
    "linear": Command("linear classifiers on frozen features, paper appendix F.2", _linear),
    "logistic": Command("logistic regression with few labels, paper appendix A", _logistic),
    "finetune": Command("the whole network on labels, paper section 4.2.3", _finetune),
    "retrieval": Command("images of the same thing, paper section 4.2.1", _retrieval),
    "copies": Command("copies of images, paper section 4.2.1; near duplicates", _copies),
    "segmentation": Command("objects from attention and patches, section 4.2.2", _segmentation),
    "video": Command("objects followed through videos, section 4.2.2, Table 5", _video),
}
WEIGHTS = {
    "list": Command("published weights: names, architectures, accuracies", _weights_list),
    "inspect": Command("what a file of weights is, and whether it fits", _weights_inspect),
    "convert": Command("write weights in another dialect", _weights_convert),
    "fetch": Command("download published files into the cache", _weights_fetch),
}
COMMANDS = {
    "pretrain": Command("pretrain on unlabelled images", _pretrain),
    "data": Command("look at images before training: " + ", ".join(DATA), _data),
    "evaluate": Command("measure features: " + ", ".join(EVALUATIONS), _evaluate),
    "features": Command("write the features of images to a file", _features),
    "export": Command("write weights for timm, transformers, ONNX, with a card", _export),
    "weights": Command("known and foreign weights: " + ", ".join(WEIGHTS), _weights),
    "report": Command("write the page of a run: numbers, curves, pictures", _report),
}


# ------------------------------------------------------------------------------------ plumbing
def _parse(settings: Any, prog: str, arguments: Sequence[str]) -> Any:
    import tyro

    return tyro.cli(settings, prog=prog, args=list(arguments))


def _dispatch(prog: str, commands: dict[str, Command], arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(prog, commands))
        if not arguments:
            sys.exit(2)
        return
    name, *rest = arguments
    if name not in commands:
        raise UserError(f"{prog} has no command {name!r}: known are {', '.join(commands)}")
    commands[name].run(rest)


def _help(prog: str, commands: dict[str, Command]) -> str:
    lines = [f"usage: {prog} COMMAND ...", ""]
    if prog == "dino":
        lines[:0] = [f"dino {__version__}: self-distillation with no labels (arXiv 2104.14294)", ""]
    lines += [f"  {name:12} {command.summary}" for name, command in commands.items()]
    return "\n".join([*lines, "", f"{prog} COMMAND --help tells more."])


def _fail(message: str) -> NoReturn:
    print(f"dino: {message}", file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(2)  # the other ranks may be waiting for this one: let the launcher end them
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"dino {__version__}")
        return
    try:
        _dispatch("dino", COMMANDS, arguments)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
