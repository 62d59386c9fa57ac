"""The terminal: a console that prints text as it is, and a bar for work longer than seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text


class Console(rich.console.Console):
    """A console for which names, paths and messages are text: no markup, emoji or highlighting.

    Rich's own takes `[out]` for a style and leaves it out, and fails for `[/out]`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner beside a text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


class PlainTextColumn(TextColumn):
    """A column of a progress bar: a field of its task, as it is.

    Args:
        field: such as "task.description".
        style: of the text.
    """

    def __init__(self, field: str = "task.description", style: str = "none") -> None:
        super().__init__(f"{{{field}}}", style=style, markup=False)


@contextmanager
def bar(title: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr with an estimate of the time left; none unless it is a terminal.

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
