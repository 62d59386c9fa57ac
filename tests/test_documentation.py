"""The documentation is run: every block of code, in order, in one folder of small stand-ins.

The blocks stay as a user reads them; one of the language `text` shows an output and is left out.
What is changed so that they take seconds stands in the tables below; an entry that no block needs
any more fails. `helpers/stand_ins.py` writes the images.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from functools import cache, wraps
from importlib import import_module
from io import StringIO
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from helpers import stand_ins
from helpers.documents import FILES, ROOT, Code, blocks, inline, links
from helpers.small import TINY_RUN

from dino import cli
from dino.train import recipes
from dino.train.config import PretrainConfig

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")

NOT_RUN = {
    "pip install -e '.[fast]'": "it needs the network",
    "pip install lightly matplotlib": "it needs the network",
    "import faiss": "it is no dependency",
}
"""Commands, and Python blocks that begin with a line, that are not run, and why."""

REPLACED = {
    "torchrun --nproc_per_node 8 -m dino": "dino",  # tests/distributed runs several processes
    "--weights dino_vitb8": "--weights W",  # would be downloaded
    "--budget 1h ": "",  # would time networks of the real size
    "--budget 75m ": "",
    "--budget 85m ": "",
    "--count 100": "--count 4",  # there are 16 images
}

APPENDED = {
    "dino pretrain": '--device cpu --run.batch 4 --run.duration "2 epochs"',
    "dino data check": "--workers 0",
    "dino data stats": "--workers 0",
    "dino features": "--workers 0",
    "dino evaluate knn": "--workers 0",
    "dino evaluate linear": "--workers 0 --epochs 2",
    "dino evaluate logistic": "--workers 0",
    "dino evaluate finetune": "--workers 0 --epochs 2 --warmup 1 --batch 4",
    "dino evaluate retrieval": "--workers 0",
    "dino evaluate copies": "--workers 0",
    "dino search": "--workers 0",
    "dino duplicates": "--workers 0",
    "dino map": "--workers 0",
    "dino cluster": "--workers 0",
    "dino select": "--workers 0",
    "dino distance": "--workers 0",
    "dino anomalies": "--size 64",
    "dino segment": "--size 64",
    "dino components": "--size 64",
    "dino objects": "--size 64",
}
"""Options behind the commands that begin so: less time, and no other processes."""

SMALL_DATA = {
    **TINY_RUN,
    **{"model.depth": 4, "model.patch_size": 16},
    **{"views.global_size": 32, "views.local_size": 16},
    "run.duration": "2 epochs",
}
"""Settings of the recipe `small_data` here."""
LAPTOP = {
    name: value
    for name, value in SMALL_DATA.items()
    if not name.startswith("model.") and name != "execution.knn_every"
}
"""Settings of the recipe `laptop` here."""

NAMES: dict[str, Callable[[], Any]] = {"images": lambda: torch.rand(2, 3, 32, 32)}
"""What Python blocks use and leave to the reader."""

BLOCKS = [block for file in FILES for block in blocks(file) if block.language != "text"]
INLINE = [code for file in FILES for code in inline(file)]


def ids(found: list[Code]) -> list[str]:
    return [code.place for code in found]


# ---------------------------------------------------------------------------- blocks of code
def small(command: str) -> str:
    """A command with its entries of `REPLACED` and `APPENDED`."""
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    for start, more in APPENDED.items():
        if _begins(command, start):
            for option in re.findall(r"--[\w.-]+", more):  # no option may be given twice
                command = re.sub(rf"{option} (\"[^\"]*\"|'[^']*'|\S+)", "", command)
            command = f"{command} {more}"
    return command


def _begins(command: str, words: str) -> bool:
    return command.split()[: len(words.split())] == words.split()


def run_shell(block: Code) -> None:
    for command in block.commands:
        if command in NOT_RUN:
            continue
        program, *words = shlex.split(small(command), comments=True)
        if program == "python":  # a benchmark: its options are parsed below
            continue
        if program == "make":
            subprocess.run([program, "--dry-run", *words], cwd=ROOT, check=True, timeout=60)
        else:
            assert program == "dino", f"{block.place}: no rule says how to run {command}"
            try:
                cli.main(words)
            except SystemExit as end:
                raise AssertionError(f"{block.place}: {command}: exit status {end.code}") from end
            for option, value in () if "--dry-run" in words else pairwise(words):
                assert option != "--out" or Path(value).exists(), f"{command}: no {value}"


def run_python(block: Code) -> None:
    text = block.text
    if text.splitlines()[0] in NOT_RUN:
        return
    names = {name: make() for name, make in NAMES.items() if re.search(rf"\b{name}\b", text)}
    exec(compile("\n" * (block.line - 1) + text, str(ROOT / block.file), "exec"), names)


RUNNERS = {"": run_shell, "python": run_python}


class Place:
    """A folder in which blocks are run in their order, each of them once."""

    def __init__(self) -> None:
        self.ended: list[Exception | None] = []

    def run(self, block: Code) -> None:
        """Run all blocks up to this one; raise the error of this one only."""
        number = BLOCKS.index(block)
        for following in BLOCKS[len(self.ended) : number + 1]:
            try:
                RUNNERS[following.language](following)
                self.ended.append(None)
            except Exception as error:
                self.ended.append(error)
        if (error := self.ended[number]) is not None:
            raise error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    stand_ins.write_all(root)
    return root


@pytest.fixture(scope="module")
def shared() -> Place:
    return Place()


def smaller(recipe: Callable[[], PretrainConfig], changes: dict[str, Any]) -> Any:
    @wraps(recipe)  # the help shows its docstring
    def small_recipe() -> PretrainConfig:
        return recipe().changed(changes)

    return small_recipe


@pytest.fixture
def place(folder: Path, shared: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, changes in (("small_data", SMALL_DATA), ("laptop", LAPTOP)):
        monkeypatch.setitem(recipes.RECIPES, name, smaller(getattr(recipes, name), changes))
    monkeypatch.setattr("dino.show.explorer.server.Served.wait", lambda page: page.stop())
    monkeypatch.chdir(folder)
    return shared


@pytest.mark.parametrize("block", BLOCKS, ids=ids(BLOCKS))
def test_block_runs(block: Code, place: Place) -> None:
    place.run(block)


def test_no_exception_is_stale() -> None:
    shell = [block for block in BLOCKS if RUNNERS[block.language] is run_shell]
    commands = [command for block in shell for command in block.commands]
    lines = [line.strip() for block in BLOCKS for line in block.text.splitlines()]
    python = "".join(block.text for block in BLOCKS if block not in shell)
    replaced = [small(command) for command in commands]
    stale = [entry for entry in NOT_RUN if entry not in commands + lines]
    stale += [old for old in REPLACED if not any(old in command for command in commands)]
    stale += [words for words in APPENDED if not any(_begins(one, words) for one in replaced)]
    stale += [name for name in NAMES if not re.search(rf"\b{name}\b", python)]
    assert stale == []


# ---------------------------------------------------------------- commands within sentences
def every(commands: Mapping[str, Any], prefix: str = "dino") -> Iterator[str]:
    for name, command in commands.items():
        if isinstance(command, cli.Group):
            yield from every(command.commands, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}"


OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


@cache
def options(command: str) -> set[str]:
    """The options of a command, from its help; those of a script, from its text."""
    if command.startswith("dino"):
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
            cli.main([*command.split()[1:], "--help"])
        return {*OPTION.findall(printed.getvalue())}
    return {*OPTION.findall((ROOT / command).read_text(encoding="utf-8"))}


def unknown_options(code: Code) -> list[str]:
    """What a sentence calls an option, though its command has none of that name."""
    text = code.text.removeprefix("torchrun --nproc_per_node 8 -m ")
    commands = [name for name in every(cli.COMMANDS) if _begins(text, name)]
    if not commands and text.startswith("--"):
        commands = [*every(cli.COMMANDS), *SCRIPTS]
    elif not commands and re.match("dino [a-z]", text):
        groups = {name.rpartition(" ")[0] for name in every(cli.COMMANDS)} - {"dino"}
        commands = [name for name in every(cli.COMMANDS) for g in groups if _begins(text, g)]
        if not commands:
            return [text]
    known = {option for name in commands for option in options(name)}
    return [
        option
        for option in (OPTION.findall(text) if commands else [])
        if not any(one == option or (option[-1] == "." and one.startswith(option)) for one in known)
    ]


@pytest.mark.parametrize("file", FILES)
def test_options_in_sentences_exist(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    codes = [code for code in INLINE if code.file == file]
    assert [(code.place, wrong) for code in codes if (wrong := unknown_options(code))] == []


# ------------------------------------------------------------------------- scripts and names
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("[be]*s/*.py"))]
CALLS = [code for code in INLINE if code.text.startswith("python ")]
CALLS += [
    Code(script, number, line.strip())
    for script in SCRIPTS
    for number, line in enumerate((ROOT / script).read_text(encoding="utf-8").splitlines(), 1)
    if line.startswith("    python ")
]


class Parsed(Exception):
    """The options of a script were accepted."""


def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parsing(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    return parsing


@pytest.mark.parametrize("call", CALLS, ids=ids(CALLS))
def test_scripts_accept_their_documented_options(
    call: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, script, *words = shlex.split(call.text)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    monkeypatch.setattr(ArgumentParser, "parse_args", stopping(ArgumentParser.parse_args))
    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


TOP = ("src", "tests", "docs", "benchmarks", "examples", "requirements")
EXISTING = {
    f"/{path.relative_to(ROOT).as_posix()}" for top in TOP for path in (ROOT / top).rglob("*")
}
EXISTING |= {f"/{path.name}" for path in ROOT.iterdir()}
PATH = re.compile(rf"(?:[a-z_]+/)*[a-z_]+\.py|[A-Z]+\.md|(?:{'|'.join(TOP)})/[\w./-]*")


@pytest.mark.parametrize("file", FILES)
def test_paths_of_the_repository_exist(file: str) -> None:
    folder = (ROOT / file).parent
    missing = [target for target in links(file) if not (folder / target).exists()]
    for code in (code for code in INLINE if code.file == file):
        named = [word.rstrip("/") for word in re.findall(r"[\w./*-]+", code.text)]
        named = [name for name in named if PATH.fullmatch(name)]
        missing += [name for name in named if not any(p.endswith(f"/{name}") for p in EXISTING)]
    assert missing == []


def test_names_in_the_map_of_the_paper_exist() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    missing, names = [], 0
    for code in (code for code in INLINE if code.file == "docs/paper-map.md"):
        if found := re.fullmatch(r"([a-z_/]+)\.py: ([\w.]+)", code.text):
            module = import_module(f"dino.{found[1].replace('/', '.')}")
            missing += [code.text] * (not _has(module, found[2]))
            names += 1
        elif re.fullmatch(r"test_\w+\*?", code.text):
            missing += [code.text] * (f"def {code.text.rstrip('*')}" not in tests)
    assert missing == []
    assert names > 5


def _has(module: Any, name: str) -> bool:
    with suppress(AttributeError):
        return attrgetter(name)(module) is not None
    return False


def test_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = {
        extra
        for code in [*BLOCKS, *INLINE]
        for found in re.findall(r"pip install [^\n]*\[([a-z,]+)\]", code.text)
        for extra in found.split(",")
    }
    assert {"fast", "tiff"} <= named
    assert [extra for extra in named if f"\n{extra} = [" not in project] == []
