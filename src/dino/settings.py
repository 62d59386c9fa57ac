"""Settings as dataclasses, whose values are validated against their annotations before any work.

    @dataclass(frozen=True)
    class Settings:
        optimizer: Literal["adamw", "sgd"] = "adamw"
        lr: Annotated[float, Range(above=0)] = 5e-4

`validated(Settings(lr=-1))` raises "lr is -1: it must be a number above 0".
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dino.files import UserError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of each number of a tuple: `low` and `high` belong to the range."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Whether a number lies in the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low:,} to {self.high:,}"
        ends = {"of at least": self.low, "above": self.above, "of at most": self.high}
        ends["below"] = self.below
        return " and ".join(f"{words} {end:,}" for words, end in ends.items() if end is not None)


@dataclass(frozen=True)
class Form:
    """The regular expression of a text, and its description, such as "a number of steps"."""

    pattern: str
    words: str

    def allows(self, value: Any) -> bool:
        """Whether a text has this form."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


class _Mismatch(Exception):
    """A value that its annotation does not allow."""


def validated(settings: Settings, prefix: str = "") -> Settings:
    """A dataclass whose values conform to their annotations: `settings`, or a converted copy.

    Integers are converted to floats, lists to tuples, texts to paths, scalars of numpy and torch to
    numbers. A bool is no number, and NaN and infinity are never allowed.

    Args:
        settings: nested dataclasses are validated as well.
        prefix: of the names of its fields in messages, such as "optim.".

    Raises:
        UserError: naming the first value that does not conform, and its annotation in words.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    changed = {}
    for name in (f.name for f in dataclasses.fields(settings) if f.init):  # type: ignore[arg-type]
        value = getattr(settings, name)
        if (converted := conform(value, hints[name], prefix + name)) is not value:
            changed[name] = converted
    return dataclasses.replace(settings, **changed) if changed else settings  # type: ignore[type-var]


def conform(value: Any, hint: Any, name: str) -> Any:
    """`value` converted to the annotation `hint`; raises `UserError`, with `name`, if it cannot."""
    try:
        return _converted(value, hint, (), name)
    except _Mismatch:
        shown = textwrap.shorten(repr(value), 80)
        raise UserError(f"{name} is {shown}: it must be {in_words(hint)}") from None


def parsed(kind: type[Settings], content: Any, path: str | Path) -> Settings:
    """The dataclass `kind` from the content of a JSON file.

    Raises:
        UserError: naming the file, for a missing or unknown key or a value that does not conform.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        if not isinstance(content, dict) or not content.keys() <= names:
            raise TypeError(f"an object with the keys {', '.join(sorted(names))} is expected")
        return validated(kind(**content))
    except (TypeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy") from None


def _converted(value: Any, hint: Any, limits: tuple[Any, ...], name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _converted(value, arguments[0], (*limits, *arguments[1:]), name)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    if origin in (Union, UnionType):
        for choice in arguments:
            with suppress(_Mismatch):
                return _converted(value, choice, limits, name)
        raise _Mismatch
    if origin is tuple:
        return _tuple(value, arguments, limits, name)
    if origin is dict:
        found = {
            _converted(key, arguments[0], (), name): _converted(item, arguments[1], limits, name)
            for key, item in _checked(value, isinstance(value, Mapping)).items()
        }
        unchanged = isinstance(value, dict) and all(found.get(key) is value[key] for key in value)
        return value if unchanged else found
    if origin is Literal:
        return _checked(value, any(type(value) is type(x) and value == x for x in arguments))
    if dataclasses.is_dataclass(hint):
        return validated(_checked(value, isinstance(value, hint)), f"{name}.")  # type: ignore[arg-type]
    return _plain(value, hint, limits)


def _tuple(value: Any, hints: tuple[Any, ...], limits: tuple[Any, ...], name: str) -> Any:
    _checked(value, isinstance(value, (list, tuple)))
    if hints[-1] is ...:
        hints = hints[:1] * len(value)
    _checked(value, len(value) == len(hints))
    items = tuple(_converted(*pair, limits, name) for pair in zip(value, hints, strict=True))
    unchanged = isinstance(value, tuple) and all(map(operator.is_, items, value))
    return value if unchanged else items


def _plain(value: Any, hint: Any, limits: tuple[Any, ...]) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        with suppress(OverflowError):
            value = float(value)
        _checked(value, isinstance(value, float) and math.isfinite(value))
    elif hint is int:
        _checked(value, number and isinstance(value, int))
    elif hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hint is Path and isinstance(value, str):
        value = Path(value)
    elif isinstance(hint, type) and hint is not Any:
        _checked(value, isinstance(value, hint))
    ranges = [limit for limit in limits if isinstance(limit, (Range, Form))]
    return _checked(value, all(limit.allows(value) for limit in ranges))


def _checked(value: Any, allowed: bool) -> Any:
    if not allowed:
        raise _Mismatch
    return value


ONE = {int: "an integer", float: "a number", str: "text", bool: "True or False", Path: "a path"}
MANY = {int: "integers", float: "numbers", str: "texts", bool: "True or False", Path: "paths"}


def in_words(hint: Any) -> str:
    """An annotation in words, such as "a number above 0"."""
    return _words(hint, ())


def _words(hint: Any, limits: tuple[Any, ...], names: Mapping[Any, str] = ONE) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(arguments[0], (*limits, *arguments[1:]), names)
    if origin in (Union, UnionType):
        return " or ".join(_words(choice, limits, names) for choice in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return count + _words(arguments[0], limits, MANY)
    if hint is NoneType:
        return "None"
    text = names.get(hint, getattr(hint, "__name__", str(hint)))
    forms = [str(limit) for limit in limits if isinstance(limit, Form)]
    return " ".join(forms or [text, *(str(limit) for limit in limits if isinstance(limit, Range))])
