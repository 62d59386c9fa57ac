"""Names and messages reach the terminal as they are, whatever brackets and braces they hold."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
import rich.console
from rich.progress import Progress
from rich.table import Table

import dino
from dino import progress
from dino.progress import Console, PlainTextColumn, bar

NAME = "a[out]/set[ [/red] :smile: {0} {x} 1"


def shown(write: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    write(console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def in_a_table(console: Console) -> None:
    table = Table("name", title=NAME)
    table.add_row(NAME)
    console.print(table)


def in_a_bar(console: Console) -> None:
    with Progress(PlainTextColumn(style="dim"), console=console) as bars:
        bars.add_task(NAME, total=1)


@pytest.mark.parametrize(
    "write",
    [
        lambda console: console.print(NAME, style="yellow", soft_wrap=True),
        lambda console: console.status(NAME).__enter__() and console.print("."),
        in_a_table,
        in_a_bar,
    ],
    ids=["print", "status", "table", "bar"],
)
def test_text_is_shown_as_it_is(write: Any) -> None:
    assert NAME in shown(write)


def test_the_bar_shows_its_title_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    terminal = lambda **_: Console(file=file, force_terminal=True, width=200)  # noqa: E731
    monkeypatch.setattr(progress, "Console", terminal)
    with bar(NAME, 3) as advance:
        advance(1)
    assert NAME in file.getvalue()


def test_no_module_prints_with_another_console() -> None:
    """Rich's own console and text column read markup."""
    assert issubclass(Console, rich.console.Console)
    found = []
    for path in Path(dino.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                names = {alias.name for alias in node.names}
                if names & {"Console", "TextColumn", "print", "get_console"}:
                    found.append(path.name)
    assert found == ["progress.py"]


@pytest.mark.parametrize(("encoding", "cell"), [("ascii", "29.0 +- 3.2"), ("utf-8", "29.0 ± 3.2")])
def test_tables_keep_their_columns_in_ascii(encoding: str, cell: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    table = Table("λ", title="± error")
    table.add_row("29.0 ± 3.2")
    Console(file=file).print(table)
    file.seek(0)
    lines = file.read().splitlines()
    assert cell in lines[4]
    assert len({len(line) for line in lines[1:]}) == 1
    assert ("lambda" in lines[2]) == (encoding == "ascii")
