"""A bar for work that takes longer than seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(title: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar with the time left on stderr, nothing where that is no terminal.

    Args:
        title: what the bar says.
        total: how many there are to do; None where nobody knows.
        shown: False for none at all.

    Yields:
        A function that is told how many more are done.
    """
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
