"""Write a page anew whenever a run has something new, until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dino.progress import Console
from dino.show.report.run_contents import Run

SHARE = 0.01
"""Of the time, at most so much is spent on pages, since a training needs the processor."""

EVERY, QUIET = 2.0, 60.0
"""Seconds between looks at the files, and without news after which a run may have stopped."""

LONGEST = 24 * 3600.0
"""Seconds without news after which a run has stopped whose file system knows no locks."""

FILES = ("config.json", "metrics.jsonl", "results.json", "checkpoints/LAST", "skipped.csv")
"""Whose changes are news, as are those in `results` and `snapshots`."""


def watch(folders: Sequence[Path], write: Callable[[], Path]) -> bool:
    """Call `write` at once, and again when runs have something new, until all have ended.

    A run has ended when its process is gone, whether its last step is done or not. After each page
    there is a pause, so that all pages together take at most `SHARE` of the time.

    Args:
        folders: of the runs.
        write: writes the page and returns its path.

    Returns:
        Whether the runs ended; False after Ctrl-C.
    """
    console = Console(stderr=True)
    seen, news = None, time.monotonic()
    try:
        while True:
            now, pause = _state(folders), EVERY
            quiet = time.monotonic() - news if now == seen else 0.0
            if not any(_goes_on(folder, quiet) for folder in folders):
                break
            if now != seen:
                started = time.monotonic()
                path = write()
                news = time.monotonic()
                pause = max(EVERY, (news - started) * (1 / SHARE - 1))
                if seen is None:
                    console.print(f"watching {path}: Ctrl-C ends this", soft_wrap=True)
                seen = now
            time.sleep(pause)
    except KeyboardInterrupt:
        return False
    for folder in folders:
        if not (run := Run(folder)).finished:
            console.print(f"{folder} has stopped at step {run.done:,}", soft_wrap=True)
    return True


def _state(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Which files there are, when they were changed and how large they are."""
    found = []
    for folder in folders:
        paths = [*(folder / name for name in FILES), *folder.glob("results/*.json")]
        for path in (*paths, *folder.glob("snapshots/*.npz")):
            with suppress(OSError):  # not there, or gone in between
                about = path.stat()
                found.append((str(path), about.st_mtime_ns, about.st_size))
    return found


def _goes_on(folder: Path, quiet: float) -> bool:
    """Whether a run without news for so many seconds may have some later."""
    finished = Run(folder).finished
    if not finished and quiet < QUIET:
        return True
    held = locked(folder / ".lock")
    return (not finished and quiet < LONGEST) if held is None else held


def locked(path: Path) -> bool | None:
    """Whether another process holds the lock of a run folder; None where that cannot be known."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):  # Windows, or a file system without locks
        return None
    return False
