"""The words of a command line: one grammar for all commands, and one sentence for each mistake.

Weights and images are the first words, or named: `dino evaluate knn RUN photos/ --k 20` is
`dino evaluate knn --weights RUN --data photos/ --k 20`. tyro converts the values.
"""

from __future__ import annotations

import io
import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dino.files import UserError
from dino.settings import in_words

Settings = TypeVar("Settings")

POSITIONAL = ("weights", "data")
"""Options that may be given without their names, in this order."""

EXAMPLES = {"weights": "runs/mine", "data": "photos/", "val": "labelled/", "out": "runs/mine"}
"""Values in the commands that messages propose; `examples` of the settings replaces some."""

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value in the help, unless its annotation has a metavar."""


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        hint: the annotation of its value.
        num_values: how many words of values follow it; None for any number.
        numbers: whether any number of numbers follow it: another word ends them.
        required: whether the command needs it.
    """

    hint: Any
    num_values: int | None
    numbers: bool
    required: bool


def parse(
    settings: type[Settings],
    prog: str,
    words: Sequence[str],
    *,
    before: Sequence[str] = (),
    **options: Any,
) -> Settings:
    """The dataclass `settings` from the words of a command.

    Args:
        settings: a field is an option. As class variables it may have `renamed`, the new names of
            former options, and `examples`, values for the commands that messages propose, or
            functions of the values so far.
        prog: the command, for messages and the help.
        words: what follows it.
        before: what the usage shows before weights and images.
        options: for `tyro.cli`.

    Raises:
        UserError: in one sentence, for a word that the command does not take, an option that it
            does not have or misses, or a value of another kind.
        SystemExit: with 0 after `--help`.
    """
    known, given = find_options(settings), dict[str, list[str]]()
    if not asks_for_help(words):
        free, given = split(settings, prog, words)
        given = _with_positional(prog, free, given, known)
        _require(settings, prog, given, known)
        words = [word for group in given.values() for word in group]
    names = [(name.upper(), known[name].required) for name in POSITIONAL if name in known]
    usage = " ".join(
        [prog, *before, *(name if required else f"[{name}]" for name, required in names)]
    )
    errors = io.StringIO()
    try:
        with redirect_stderr(errors), _metavars():
            return tyro.cli(settings, prog=usage, args=list(words), **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_wrong_value(prog, errors.getvalue(), given, known)) from None


# ------------------------------------------------------------------------------ the options
def find_options(settings: Any, prefix: str = "", switches: bool = True) -> dict[str, Option]:
    """The options of a dataclass by their names, such as "optim.lr-end".

    With `switches`, an option that is on or off takes no value.
    """
    hints, found = get_type_hints(settings, include_extras=True), dict[str, Option]()
    for field in fields(settings):
        hint, marks = _unwrapped(hints[field.name])
        name = prefix + field.name.replace("_", "-")
        own = switches and tyro.conf.FlagConversionOff not in marks
        if is_dataclass(hint):
            nameless = any(getattr(mark, "name", None) == "" for mark in marks)
            found |= find_options(hint, prefix if nameless else f"{name}.", own)
            continue
        is_switch = hint is bool and own
        required = field.default is MISSING and field.default_factory is MISSING
        num_values = 0 if is_switch else _num_values(hint)
        numbers = any(one in (tuple[int, ...], tuple[float, ...]) for one in _choices(hint))
        option = Option(hints[field.name], num_values, numbers, required)
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        for one in (name, *(alias.lstrip("-") for alias in aliases), *[f"no-{name}"] * is_switch):
            found[one] = option
    return found


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type, and what `Annotated` adds to it."""
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _choices(hint: Any) -> list[Any]:
    """The types of a union; of another type itself."""
    union = get_origin(hint) in (Union, UnionType)
    return [_unwrapped(one)[0] for one in (get_args(hint) if union else (hint,))]


def _num_values(hint: Any) -> int | None:
    for choice in _choices(hint):
        if get_origin(choice) is tuple:
            return None if ... in get_args(choice) else len(get_args(choice))
    return 1


# ------------------------------------------------------------------------------ the words
def asks_for_help(words: Sequence[str]) -> bool:
    """Whether one of the words of a command is -h or --help."""
    return not {"-h", "--help"}.isdisjoint(words)


def split(settings: Any, prog: str, words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The positional words of a command, and by the name of each option the words that give it.

    Raises:
        UserError: for an option that the command does not have, or that is given twice.
    """
    known = find_options(settings)
    renamed = {_plain(old): _plain(new) for old, new in getattr(settings, "renamed", {}).items()}
    rest, free = deque(words), list[str]()
    given: dict[str, list[str]] = {}
    while rest:
        word = rest.popleft()
        if not _is_option(word):
            free.append(word)
            continue
        name, value = _plain(word.partition("=")[0]), "=" in word
        if name in renamed:
            raise UserError(f"{prog}: --{name} is called --{renamed[name]} now")
        if name not in known or not word.startswith("--"):
            raise UserError(f"{prog} has no option {word.partition('=')[0]}: {_near(name, known)}")
        if name in given:
            raise UserError(f"{prog}: --{name} is given twice: give it once")
        if value:  # --size=3, or --title=-dashed-
            attached = word.partition("=")[2]
            given[name] = [word] if _is_option(attached) else [f"--{name}", attached]
            continue
        given[name] = [f"--{name}"]
        while rest and known[name].num_values != len(given[name]) - 1 and not _is_option(rest[0]):
            if known[name].numbers and _is_number(given[name][-1]) and not _is_number(rest[0]):
                break
            given[name].append(rest.popleft())
        if len(given[name]) - 1 < (known[name].num_values or 0):
            raise UserError(_must_be(prog, name, given[name], known[name]))
    return free, given


def _with_positional(
    prog: str,
    free: list[str],
    given: Mapping[str, list[str]],
    known: Mapping[str, Option],
) -> dict[str, list[str]]:
    """The words of all options, those without their name too."""
    placed = {}
    for name in POSITIONAL:
        if free and name in known and name not in given:
            count = known[name].num_values
            taken = len(free) if count is None else count
            placed[name], free = [f"--{name}", *free[:taken]], free[taken:]
    if free:
        takes = " ".join(name.upper() for name in POSITIONAL if name in known) or "only options"
        raise UserError(
            f"{prog}: {shlex.join(free)} is too much, it takes {takes}: put the name of an option "
            "before it, or leave it out"
        )
    return {**placed, **given}


def _plain(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.IGNORECASE) is not None


def _near(name: str, known: Mapping[str, Option]) -> str:
    """The options like `name`, with or without their section, the shortest first."""
    by_word: dict[str, str] = {}
    for option in sorted(known, key=len):
        for word in (option, option.rpartition(".")[2]):
            by_word.setdefault(word, option)
    same = [word for word in by_word if min(len(word), len(name)) > 3 and _begins(word, name)]
    near = [*same, *get_close_matches(name, by_word, n=2, cutoff=0.65)]
    found = list(dict.fromkeys(f"--{by_word[word]}" for word in near))[:2]
    return f"did you mean {' or '.join(found)}?" if found else "its --help lists them"


def _begins(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _require(
    settings: Any, prog: str, given: Mapping[str, list[str]], known: Mapping[str, Option]
) -> None:
    missing = [name for name, one in known.items() if one.required and name not in given]
    if not missing:
        return
    examples = {**EXAMPLES, **getattr(settings, "examples", {})}
    groups = dict(given)
    for name in missing:
        example = examples.get(name, name.upper())
        values = {other: words[-1] for other, words in groups.items()}
        groups[name] = [f"--{name}", example(values) if callable(example) else example]
    first = [word for name in POSITIONAL for word in groups.pop(name, [])[1:]]
    command = [*prog.split(), *first, *(word for group in groups.values() for word in group)]
    raise UserError(
        f"{prog} needs {' and '.join(f'--{name}' for name in missing)}: for example "
        f"{shlex.join(command)}"
    )


# ------------------------------------------------------------------------------ the values
def _metavars() -> ConstructorRegistry:
    """The rules of tyro, with `METAVARS` instead of types, also where None is allowed."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = [kind for kind in _choices(info.type) if kind is not NoneType]
        if len(kinds) != 1 or kinds[0] not in METAVARS:
            return None
        kind, optional = kinds[0], NoneType in _choices(info.type)
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=METAVARS[kind],
            instance_from_str=lambda words: (
                None if optional and words == ["None"] else kind(words[0])
            ),
            is_instance=lambda value: (
                isinstance(value, (float, int) if kind is float else kind)
                or (optional and value is None)
            ),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _wrong_value(
    prog: str, text: str, given: Mapping[str, Sequence[str]], known: Mapping[str, Option]
) -> str:
    """One sentence from what tyro says, which names the option."""
    for name in re.findall(r"--([\w.-]+)", text):
        if name in given:
            return _must_be(prog, name, given[name], known[name])
    plain = " ".join(re.sub(r"[^\w\s.,:;'\"()\[\]{}<>/=+-]", " ", text).split())
    return f"{prog}: {plain}"


def _must_be(prog: str, name: str, words: Sequence[str], option: Option) -> str:
    shown = " ".join(words[1:])
    what = f"is {shown!r}" if shown else "has no value"
    return f"{prog}: --{name} {what}: it must be {in_words(option.hint)}"
