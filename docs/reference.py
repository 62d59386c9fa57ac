"""The reference of settings and commands, from the dataclasses that make the command line."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from sphinx.pycode import ModuleAnalyzer

from dino.cli import COMMANDS, Command, Group
from dino.settings import in_words
from dino.train.config import PretrainConfig
from dino.train.recipes import RECIPES


def write(folder: Path) -> None:
    """Write `configuration.md` and `commands.md`."""
    folder.mkdir(exist_ok=True)
    (folder / "configuration.md").write_text("\n".join(configuration()), encoding="utf-8")
    (folder / "commands.md").write_text("\n".join(commands()), encoding="utf-8")


def configuration() -> Iterator[str]:
    """Every setting of `dino pretrain`, section by section, and what each recipe changes."""
    default = PretrainConfig()
    yield "# Settings of pretraining\n"
    yield (
        '`dino pretrain RECIPE --SECTION.NAME VALUE`, or `settings={"SECTION.NAME": VALUE}` from '
        "Python. Words in a name are divided by dashes on the command line, by underscores in "
        "Python and `config.json`. The defaults are those of a run without a recipe.\n"
    )
    for section in dataclasses.fields(default):
        settings = getattr(default, section.name)
        if dataclasses.is_dataclass(settings):
            yield f"## {section.name}\n"
            yield f"{_first(type(settings).__doc__)}\n"
            yield from _table(type(settings), settings, f"{section.name}.")
    yield "## Recipes\n"
    yield "What each recipe sets, where it differs from the defaults.\n"
    flat = default.flat()
    for name, recipe in RECIPES.items():
        config = recipe().flat()
        changed = {key: value for key, value in config.items() if value != flat.get(key)}
        yield f"### {name}\n"
        yield f"{_first(recipe.__doc__)}\n"
        yield from _rows(("setting", "value"), {f"`{k}`": (_value(v),) for k, v in changed.items()})


def commands() -> Iterator[str]:
    """Every command with its options."""
    yield "# Commands\n"
    yield "`dino COMMAND --help` prints the same. Weights and images may stand first, unnamed.\n"
    for name, command in _all(COMMANDS, "dino"):
        module, _, rest = command.target.partition(":")
        kind = rest.partition(":")[0]
        yield f"## {name}\n"
        yield f"{command.summary[:1].upper()}{command.summary[1:]}.\n"
        settings = getattr(importlib.import_module(f"dino.{module}"), kind)
        if isinstance(settings, type) and dataclasses.is_dataclass(settings):
            yield from _table(settings, None, "--")
        else:
            yield "See [settings of pretraining](configuration.md).\n"


def _all(table: Mapping[str, Command | Group], prefix: str) -> Iterator[tuple[str, Command]]:
    for name, entry in table.items():
        if isinstance(entry, Group):
            yield from _all(entry.commands, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", entry


def _table(kind: type, values: Any, prefix: str) -> Iterator[str]:
    hints, texts = get_type_hints(kind, include_extras=True), _docstrings(kind)
    rows = {}
    for field in dataclasses.fields(kind):
        name, default = field.name, field.default
        if prefix == "--":
            name = name.replace("_", "-")
        if values is not None:
            default = getattr(values, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "*required*" if default is dataclasses.MISSING else _value(default)
        rows[f"`{prefix}{name}`"] = (shown, in_words(hints[field.name]), texts.get(field.name, ""))
    yield from _rows(("name", "default", "value", "meaning"), rows)


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field, also of base classes."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        documented = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
        for (owner, name), lines in documented.items():
            if owner == base.__name__:
                found[name] = " ".join(" ".join(lines).split())
    return found


def _rows(head: tuple[str, ...], rows: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for name, cells in rows.items():
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in (name, *cells))
        yield f"| {' | '.join(escaped)} |"
    yield ""


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value}"


def _first(docstring: str | None) -> str:
    """The first paragraph of a docstring."""
    return " ".join((docstring or "").strip().partition("\n\n")[0].split())
