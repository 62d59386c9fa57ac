"""The terminal: a console that prints text without markup, and a bar for work of some seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column
from rich.text import Text

FILE_WIDTH = 160
"""Columns of tables in files and pipes, unless the variable COLUMNS says otherwise."""

SPELLED = str.maketrans({"±": "+-", "λ": "lambda"})
"""Our characters that some terminals lack."""


class Console(rich.console.Console):
    """A console without markup, emoji and highlighting: rich would remove `[out]` from names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not (self.is_terminal or "width" in options or os.environ.get("COLUMNS")):
            self.width = FILE_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """The text; spelled otherwise in an ASCII terminal, so that tables keep their columns."""
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(SPELLED)
        return super().render_str(text, **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner beside a text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


class PlainTextColumn(TextColumn):
    """A column of a progress bar with a field of its task, without markup."""

    def __init__(
        self,
        field: str = "task.description",
        style: str = "none",
        table_column: Column | None = None,
    ) -> None:
        super().__init__(f"{{{field}}}", style=style, markup=False, table_column=table_column)


@contextmanager
def bar(title: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr with an estimate of the remaining time; none without a terminal.

    Args:
        title: the text before the bar.
        total: the number of items; None if it is unknown.
        shown: False for no bar.

    Yields:
        A function that adds a number of finished items.
    """
    console = Console(stderr=True)
    columns = (PlainTextColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
