"""A bar for work that takes longer than seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
