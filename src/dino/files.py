"""Atomic writes, safe reads, and the exception that means "the user can fix this".

A reader of a file gets its old or its new content, never a mixture: the bytes go to a temporary
sibling, are flushed to the disk, and the sibling is renamed.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake by the user: one sentence that says what to do (the command exits with 2)."""


# ------------------------------------------------------------------------------- errors of the disk
ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, or choose another place"),
    errno.EIO: "check the disk or the network share, or choose another place",
    errno.EISDIR: "name a file",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENXIO: "let another program read it first",
    errno.EROFS: "choose another place",
}
# Rust (safetensors) and C++ (Arrow) put the error of the system into their exceptions' texts.
_NUMBER = re.compile(r"(?:code: |os error |errno )(\d+)", re.IGNORECASE)


def disk_error(error: BaseException) -> OSError | None:
    """The `OSError` behind an exception, also where a library wraps it; None for other errors."""
    if isinstance(error, UserError):
        return None
    found = _NUMBER.search(str(error))
    if isinstance(error, OSError):
        if error.errno is None and found:
            error.errno, error.strerror = int(found[1]), os.strerror(int(found[1]))
        return error
    if found and type(error).__name__ == "SafetensorError":
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None if error.__cause__ is None else disk_error(error.__cause__)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the name `path` to an `OSError` without one, also if a library's exception hides it."""
    try:
        yield
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        if found.filename is None:  # with a name, str(error) shows the reason only as `strerror`
            found.strerror = found.strerror or str(found)
            found.filename = os.fspath(path)
        if found is error:
            raise
        raise found from error


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise a `UserError` in place of an `OSError`, also where a library's exception hides one."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has gone, which is no mistake
        raise
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        raise UserError(_sentence(found)) from error


def _sentence(error: OSError) -> str:
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    name = os.fsdecode(error.filename) if named else "a file or the output"
    if isinstance(error, FileNotFoundError):
        return f"{name} does not exist: check the name"
    reason = error.strerror or str(error) or type(error).__name__
    advice = ADVICE.get(error.errno or 0, "check the file and the disk")
    return f"{name} cannot be used ({reason}): {advice}"


def check_output(
    path: str | Path,
    endings: Sequence[str] = (),
    *,
    siblings: Sequence[str] = (),
    folder: bool = False,
    option: str = "--out",
) -> None:
    """Try an output before the work that leads to it; nothing is left on the disk.

    Args:
        path: the file or folder to write; missing parents are made later.
        endings: the allowed ones, such as (".json",); () for any.
        siblings: endings of further files to write under the same name.
        folder: whether `path` is a folder.
        option: the name of `path` in the message.

    Raises:
        UserError: for another ending, a file in place of a folder or the reverse, anything else
            but a device or pipe, or a place that cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":  # only the first process writes
        return
    path = as_path(path, option)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{option} {path} has another ending than {', '.join(endings)}")
    _try_output(path, folder, option)
    for ending in siblings:
        _try_output(path.with_suffix(ending), False, option)


def _try_output(path: Path, folder: bool, option: str) -> None:
    with disk_errors():
        mode = _mode(path)
        if mode is not None:
            if stat.S_ISDIR(mode) != folder:
                what, wanted = ("file", "folder") if folder else ("folder", "file")
                raise UserError(f"{option} {path} is a {what}: name a {wanted}")
            if not folder and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "it is write-protected", f"{option} {path}")
            if not (folder or stat.S_ISREG(mode)):
                if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
                    raise UserError(f"{option} {path} is neither file nor folder: change the name")
                return
        place = path if folder else _target(path).parent
        while _mode(place) is None and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{option} {path} lies below {place}, which is a file")
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"0")
        except OSError as error:
            error.filename = f"{option} {path}"
            raise


def check_outside(path: str | Path | None, images: Any, option: str = "--out") -> None:
    """Refuse an output among images, which would later be read as one of them.

    Args:
        path: the file or folder to write; None for a default place.
        images: only a folder is looked at.
        option: the name of `path` in the message.

    Raises:
        UserError: naming a place outside.
    """
    if path is None or not isinstance(images, (str, os.PathLike)):
        return
    place, folder = Path(os.path.realpath(path)), Path(os.path.realpath(images))
    if folder.is_dir() and folder in (place, *place.parents):
        raise UserError(
            f"{option} {path} lies in the folder of images {images}, of which it would become a "
            f"part: choose another place, such as {folder.parent / place.name}"
        )


def as_path(value: Any, name: str) -> Path:
    """The argument `name` as a path; raises `UserError` if it is neither text nor a path."""
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    raise UserError(f"{name} must be a path, not {value!r}")


def _mode(path: Path) -> int | None:
    """The mode of what a path leads to; None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _target(path: Path) -> Path:
    """Where a symbolic link leads, so that what it names is replaced and not the link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


# ----------------------------------------------------------------------------------------- folders
def cache_folder() -> Path:
    """The folder of what can be made or fetched again: it may be missing, or not writable.

    `DINO_CACHE`, or else `dino` in the platform's folder for caches: `XDG_CACHE_HOME` (`~/.cache`)
    on Linux, `~/Library/Caches` on macOS, `LOCALAPPDATA` on Windows.
    """
    if named := os.environ.get("DINO_CACHE"):
        return Path(named)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, unlike Path.home() it never raises
    if not home.is_absolute():  # neither HOME nor an entry in the list of users
        home = Path("/nonexistent")
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
    with _where_supported(), naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    with path.open("rb+") as file, _where_supported(), naming(path):
        os.fsync(file.fileno())


@contextmanager
def _where_supported() -> Iterator[None]:
    """Continue where network shares and FUSE lack chmod, or fsync of a folder."""
    try:
        yield
    except OSError as error:
        lacking = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
        if error.errno not in lacking:
            raise


# ----------------------------------------------------------------------------------------- writing
@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling path; on success it replaces `path`, on an error it is removed.

    Of a symbolic link the target is replaced, and a file keeps its permissions. A device, a pipe
    and the output of the program (`/dev/stdout`) are written to.

    Raises:
        OSError: naming `path`, which is unchanged.
    """
    path = Path(path)
    mode = _mode(path)
    stream = None if mode is None else _stream(path)
    if mode is not None and (stream is not None or not stat.S_ISREG(mode)):
        with naming(path), tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "content"
            _write_through(Path(folder) / "content", path, stream)
        return
    path = _target(path)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(0o666 if mode is None else 0o600, exist_ok=False)
            permissions = stat.S_IMODE(temporary.stat().st_mode if mode is None else mode)
            yield temporary
            with _where_supported():
                temporary.chmod(permissions)
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        raise


def _stream(path: Path) -> int | None:
    """1 or 2 if a path leads to stdout or stderr of the program."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed, or gone
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def _write_through(content: Path, path: Path, stream: int | None) -> None:
    if stream is None:  # without O_NONBLOCK, a pipe that nobody reads would be waited for
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(descriptor, True)
    else:
        print(end="", file=sys.stdout if stream == 1 else sys.stderr, flush=True)
        descriptor = os.dup(stream)
    with content.open("rb") as source, os.fdopen(descriptor, "wb") as target:
        shutil.copyfileobj(source, target)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def atomic_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON to `path`; NaN and infinity as null."""
    atomic_write(path, json.dumps(finite_json(content), indent=2, allow_nan=False) + "\n")


_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def atomic_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV; file names that are not UTF-8 keep their bytes.

    A text that spreadsheets would run as a formula (it begins with =, +, -, @, tab or carriage
    return and is no number) gets a leading apostrophe, which `csv_text` removes.
    """
    lines = _Lines()
    writer = csv.writer(lines, lineterminator="\r\n")  # so that both are quoted inside of cells
    for row in (header, *rows):
        writer.writerow([_csv_cell(cell) if isinstance(cell, str) else cell for cell in row])
    atomic_write(path, "".join(lines).encode("utf-8", "surrogateescape"))


class _Lines(list[str]):
    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def _csv_cell(text: str) -> str:
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
    return f"'{text}" if _FORMULA.match(text) and not number else text


def csv_text(cell: str) -> str:
    """The text of a cell that `atomic_csv` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


# ----------------------------------------------------------------------------------------- reading
def read_json(path: str | Path) -> Any:
    """The content of a JSON file; raises `UserError` if it cannot be read or is not JSON."""
    path = Path(path)
    try:
        with disk_errors(), naming(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also integers of 5,000 digits
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
