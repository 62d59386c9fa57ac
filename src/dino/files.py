"""Atomic writes, safe reads, and the one exception that means "the user can fix this".

A reader of a file written here sees the old content or the new content, never a part of it: the
bytes go to a sibling temporary file, are flushed to the disk, and the file is renamed into place.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what to do (the command exits with 2)."""


def cache_folder() -> Path:
    """Where things are kept that can be made or fetched again; whoever writes there makes it.

    `DINO_CACHE` names it. Else it is `dino` in the platform's folder for caches: `XDG_CACHE_HOME`
    (`~/.cache`) on Linux, `~/Library/Caches` on macOS, `LOCALAPPDATA` on Windows.
    """
    if named := os.environ.get("DINO_CACHE"):
        return Path(named)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, unlike Path.home() it never raises
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dino"
    variable, usual = "XDG_CACHE_HOME", home / ".cache"
    if sys.platform == "win32":
        variable, usual = "LOCALAPPDATA", home / "AppData" / "Local"
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else usual) / "dino"


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    if os.name == "nt":  # Windows cannot open a folder, and its renames are already durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling path; on success it replaces `path`, on an error it is removed.

    Raises:
        OSError: whatever the disk says (full, read-only); `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def atomic_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON to `path`, whole or not at all; NaN and infinity as null."""
    text = json.dumps(finite_json(content), indent=2, allow_nan=False)
    atomic_write(path, text + "\n")


def atomic_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV, whole or not at all; file names that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if the file does not exist or is not JSON, naming it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a JSON file ({error})") from None


def finite_json(content: Any) -> Any:
    """`content` with every NaN or infinity replaced by None, since JSON has neither."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_json(value) for value in content]
    return content


def _umask() -> int:
    # mkstemp creates files that only the owner may read; results are meant to be shared.
    mask = os.umask(0)
    os.umask(mask)
    return mask
