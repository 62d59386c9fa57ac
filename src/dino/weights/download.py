"""Downloads of published files: resumed, checked, written completely or not at all.

A file lies in the cache folder (`DINO_CACHE`, or the platform's) under `weights/`, with a JSON
beside it that records its URL and SHA-256. `DINO_MIRROR` replaces the folder that the URLs begin
with; with `DINO_OFFLINE` set nothing is downloaded.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rich.progress import wrap_file

from dino.files import UserError, atomic_json, cache_folder, read_json, sync_file, sync_folder
from dino.progress import Console
from dino.runtime import ranks
from dino.weights.files import file_hash
from dino.weights.published import Published

TRIES = 5
"""Connections in a row that bring nothing before a download is given up."""
PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
TIMEOUT = 30.0
"""Seconds without an answer after which a connection counts as cut."""
LOCK_TIMEOUT = 300.0
"""Seconds to wait for another process that downloads the file while nothing of it arrives."""


def cached_path(published: Published) -> Path:
    """Where a published file lies once it is downloaded."""
    return cache_folder() / "weights" / published.file


def source_url(published: Published) -> str:
    """Where it comes from: its published URL, or the same place below `DINO_MIRROR`."""
    base = os.environ.get("DINO_MIRROR") or published.origin.base
    return f"{base.rstrip('/')}/{published.file}"


def fetch(published: Published) -> Path:
    """The file in the cache, downloaded first if it is not there; complete and unchanged.

    If several processes need it at once, one downloads and the others wait for it. Its SHA-256 is
    compared with the published one, or, where none is, with that of the first download. Terms that
    belong to the weights are shown before a download.

    Raises:
        UserError: if it cannot be downloaded, arrived damaged, or was changed since.
    """
    path = cached_path(published)
    try:
        if path.exists() and not os.access(path.parent, os.W_OK):  # a shared cache
            return _checked(published, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not path.exists():
                _obtain(published, path)
            return _checked(published, path)
    except OSError as error:
        raise UserError(
            f"{published.name} cannot be written to {path.parent} ({error}): free space there, or "
            "set DINO_CACHE to another folder"
        ) from None


def _obtain(published: Published, path: Path) -> None:
    url = source_url(published)
    by_hand = f"put the file from {url} at {path}"
    if published.origin.terms and ranks().main:
        line = f"{published.name} is published {published.origin.terms}"
        Console(stderr=True).print(line, style="yellow", soft_wrap=True)
    if published.origin.access and not os.environ.get("DINO_MIRROR"):
        raise UserError(
            f"{published.name} is only given to those who request it: accept the "
            f"{published.origin.licence} at {published.origin.access}, download "
            f"{Path(published.file).name} and put it at {path}"
        )
    if os.environ.get("DINO_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"{published.name} is not in the cache and DINO_OFFLINE is set: {by_hand}")
    _check_address(url)
    partial = _beside(path, "part")
    known_length = _download(url, partial, by_hand)
    _beside(partial, "json").unlink(missing_ok=True)
    damaged = not _size(partial) or (path.suffix == ".pth" and not _is_intact(partial))
    if damaged or not (known_length or _has_checksums(partial)):
        partial.unlink()
        problem = (
            "arrived damaged" if damaged else "may have been cut, since no length came with it"
        )
        raise UserError(
            f"{published.name} {problem} from {url}: fetch it again, set DINO_MIRROR to another "
            f"place, or {by_hand}"
        )
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _check_address(url: str) -> None:
    """Raise `UserError` for a `DINO_MIRROR` that cannot be an address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # brackets, a port that is no number, a label of too many characters
        good = False
    if not good or not (url.isascii() and url.isprintable()) or " " in url:
        raise UserError(
            f"DINO_MIRROR must be an address that begins with http:// or https://, not as {url!r}"
        )


def _checked(published: Published, path: Path) -> Path:
    """The path of a file whose SHA-256 is the recorded one; record it on first use."""
    record, found = _beside(path, "json"), file_hash(path)
    if not found.startswith(published.sha256):
        raise UserError(
            f"{path} is not the published file (SHA-256 {found}, not {published.sha256}...): "
            "delete it and get it again"
        )
    known = _entries(record).get("sha256") if record.exists() else None
    if known not in (None, found):
        raise UserError(
            f"{path} is not what was first downloaded (SHA-256 {found}, expected {known}): delete "
            f"it to download it again, and {record.name} too to trust another"
        )
    if not record.exists() and os.access(path.parent, os.W_OK):
        size = path.stat().st_size
        atomic_json(record, {"url": source_url(published), "sha256": found, "bytes": size})
        if ranks().main and not published.sha256:
            Console(stderr=True).print(
                f"{published.name}: no hash is published; the SHA-256 of this first download, "
                f"{found}, is recorded in {record} and checked from now on",
                style="yellow",
                soft_wrap=True,
            )
    return path


# ------------------------------------------------------------------------------------ the transfer
def _has_checksums(path: Path) -> bool:
    return zipfile.is_zipfile(path)


def _is_intact(path: Path) -> bool:
    """Whether a checkpoint's records agree with their CRCs; older layouts have none."""
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, ValueError):
        return False


def _download(url: str, partial: Path, by_hand: str) -> bool:
    """Download the rest of `partial`, over as many connections as bring something.

    Returns:
        Whether the server stated the length, so that nothing can be missing.

    Raises:
        UserError: if the server does not have it, or `TRIES` connections in a row brought nothing.
    """
    failures = 0
    while True:
        before = _size(partial)
        try:
            if (complete := _continue(url, partial)) is not False:
                return complete is True
            reason = "the connection was cut"
        except HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:  # what has arrived is of another version
                partial.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url} cannot be downloaded: {reason}; or {by_hand}") from None
        except (URLError, HTTPException, TimeoutError, ConnectionError, UnicodeError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(partial) > before else failures + 1
        if failures >= TRIES:
            raise UserError(
                f"{url} cannot be downloaded ({reason}); the next try continues after "
                f"{_size(partial):,} bytes: try again later, set DINO_MIRROR, or {by_hand}"
            )
        time.sleep(PAUSE * 2 ** max(0, failures - 1))


def _continue(url: str, partial: Path) -> bool | None:
    """Download over one connection; return whether the file is complete now, None if unknown.

    The note beside `partial` says which version of the file it belongs to: its URL and the server's
    validator, which is its ETag or date.
    """
    note, start = _beside(partial, "json"), _size(partial)
    request = Request(url, headers={"User-Agent": "dino-ssl"})
    request.add_header("Accept-Encoding", "identity")
    version = _entries(note) if start and note.exists() else {}
    if version.get("url") == url and version.get("validator"):
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version["validator"])
    with urlopen(request, timeout=TIMEOUT) as answer:
        headers = answer.headers
        if answer.status != 206:  # from the beginning
            start = 0
            with _own_file(partial) as file:
                file.truncate(0)
            tag = headers.get("ETag", "")
            strong = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
            atomic_json(note, {"url": url, "validator": strong})
        elif not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.unlink()  # the server sends another range than requested
            return False
        stated = headers.get("Content-Length", "")
        length = int(stated) if re.fullmatch(r"[0-9]{1,18}", stated) else None
        console = Console(stderr=True)
        hidden = not (ranks().main and console.is_terminal)
        bar = functools.partial(wrap_file, console=console, transient=True, disable=hidden)
        shown = bar(answer, length or 0, description=partial.stem)
        with shown as body, _own_file(partial) as file:
            shutil.copyfileobj(body, file)
        if length is None:  # chunks end with a mark, without which an error is raised
            return True if getattr(answer, "chunked", False) else None
    return _size(partial) == start + length


# ------------------------------------------------------------------------------------ details
def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _entries(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours.

    Raises:
        UserError: if it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: delete it")
    return content


def _check_own(path: Path) -> None:
    """Refuse what another user of a shared cache may have put in the place of a file of ours."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(
                f"{path} is a link or no file, and would be written to: delete it, or set "
                "DINO_CACHE to another folder"
            )


def _own_file(path: Path) -> IO[bytes]:
    """A file of ours, open at its end for writing; a link is not followed."""
    _check_own(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "ab")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file's download; the system releases that of a process that dies.

    Raises:
        UserError: if another process holds it for `LOCK_TIMEOUT` seconds and downloads nothing.
    """
    partial, size, since = _beside(path, "part"), 0, time.monotonic()
    for ending in ("part", "part.json", "json"):
        _check_own(_beside(path, ending))
    with _own_file(_beside(path, "lock")) as file:
        while not _lock(file):
            if _size(partial) != size:
                size, since = _size(partial), time.monotonic()
            if time.monotonic() - since > LOCK_TIMEOUT:
                raise UserError(
                    f"another process holds {file.name} and has downloaded nothing for "
                    f"{LOCK_TIMEOUT:g} seconds: end it, or set DINO_CACHE to another folder"
                )
            time.sleep(0.1)
        yield


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is locked now."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
