"""Downloads of published files: resumed, checked, written completely or not at all.

A file lies in the cache folder (`DINO_CACHE`, or the platform's) under `weights/`, with a JSON
beside it that records its URL and SHA-256. `DINO_MIRROR` is another place for
the folder that the URLs begin with; with `DINO_OFFLINE` set nothing is downloaded.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from dino.files import UserError, atomic_json, cache_folder, read_json, sync_file, sync_folder
from dino.progress import Console, PlainTextColumn
from dino.runtime import ranks
from dino.weights.files import file_hash
from dino.weights.published import BASE, Published

TRIES = 5
"""Connections in a row that bring nothing before a download is given up."""
PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
TIMEOUT = 30.0
"""Seconds without an answer after which a connection counts as cut."""
BLOCK = 2**18


def cached_path(published: Published) -> Path:
    """Where a published file lies once it is downloaded."""
    return cache_folder() / "weights" / published.file


def source_url(published: Published) -> str:
    """Where it comes from: its published URL, or the same place below `DINO_MIRROR`."""
    mirror = os.environ.get("DINO_MIRROR")
    return f"{(mirror or BASE).rstrip('/')}/{published.file}"


def offline() -> bool:
    """Whether `DINO_OFFLINE` forbids downloads (1, true, yes or on)."""
    return os.environ.get("DINO_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def fetch(published: Published) -> Path:
    """The file in the cache, downloaded first if it is not there; complete and unchanged.

    If several processes need it at once, one downloads and the others wait for it. Its SHA-256 is
    compared with the catalogue's, or where none is published with that of the first download.

    Raises:
        UserError: if it cannot be downloaded, arrived damaged, or was changed since.
    """
    path = cached_path(published)
    try:
        if path.exists() and not os.access(path.parent, os.W_OK):  # a shared cache
            _check(published, path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(_beside(path, "lock")):
            if not path.exists():
                _obtain(published, path)
            _check(published, path)
    except OSError as error:
        raise UserError(
            f"{published.name} cannot be written to {path.parent} ({error}): free space there, or "
            "set DINO_CACHE to another folder"
        ) from None
    return path


def _obtain(published: Published, path: Path) -> None:
    url = source_url(published)
    by_hand = f"put the file from {url} at {path}"
    if offline():
        raise UserError(f"{published.name} is not in the cache and DINO_OFFLINE is set: {by_hand}")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"DINO_MIRROR must begin with http:// or https://, not as {url} does")
    partial = _Partial(_beside(path, "part"), url)
    with _bar(published.name) as report:
        _download(partial, report, by_hand)
    partial.check_content(published)
    sync_file(partial.path)
    partial.path.replace(path)
    partial.note.unlink(missing_ok=True)
    sync_folder(path.parent)


def _check(published: Published, path: Path) -> None:
    """Compare with the catalogue's hash or the recorded one; record it on first use."""
    record, found = _beside(path, "json"), file_hash(path)
    known = published.sha256 or (read_json(record).get("sha256") if record.exists() else None)
    if known is not None and found != known:
        raise UserError(
            f"{path} is not what was published or first downloaded (SHA-256 {found}, expected "
            f"{known}): delete it to download it again, and {record.name} too to trust another"
        )
    if not record.exists() and os.access(path.parent, os.W_OK):
        size = path.stat().st_size
        atomic_json(record, {"url": source_url(published), "sha256": found, "bytes": size})
        if published.sha256 is None and ranks().main:
            Console(stderr=True).print(
                f"{published.name}: no hash is published; the SHA-256 of this first download, "
                f"{found}, is recorded in {record} and checked from now on",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )


# ------------------------------------------------------------------------------------ the transfer
@dataclass(frozen=True)
class _Partial:
    """What has arrived so far, and which version of the file it belongs to."""

    path: Path
    url: str

    @property
    def note(self) -> Path:
        return _beside(self.path, "json")

    def arrived(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> str | None:
        """The server's identifier of the version that `path` belongs to."""
        if not self.note.exists():
            return None
        noted = read_json(self.note)
        mark: str | None = noted.get("validator")
        return mark if noted.get("url") == self.url else None

    def begin(self, headers: Message) -> None:
        """Start again: another version begins."""
        self.path.write_bytes(b"")
        tag = headers.get("ETag", "")
        strong = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
        atomic_json(self.note, {"url": self.url, "validator": strong})

    def check_content(self, published: Published) -> None:
        """Refuse damage before the file gets its name: by hash, else by a checkpoint's CRCs."""
        found = file_hash(self.path)
        wrong = published.sha256 is not None and found != published.sha256
        if not wrong and published.file.endswith(".pth"):
            wrong = not _is_sound(self.path)
        if wrong:
            self.path.unlink()
            self.note.unlink(missing_ok=True)
            raise UserError(
                f"{published.name} arrived damaged from {self.url} (SHA-256 {found}): fetch it "
                "again, or set DINO_MIRROR to another place"
            )


def _is_sound(path: Path) -> bool:
    """Whether a checkpoint's records agree with their CRCs; older layouts have none."""
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, ValueError):
        return False


def _download(partial: _Partial, report: Callable[[int, int | None], None], by_hand: str) -> None:
    """Download the rest of `partial`, over as many connections as bring something.

    Raises:
        UserError: if the server does not have it, or `TRIES` connections in a row brought nothing.
    """
    failures = 0
    while True:
        before = partial.arrived()
        try:
            if _continue(partial, report):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 416, 429):
                raise UserError(
                    f"{partial.url} cannot be downloaded: {reason}; or {by_hand}"
                ) from None
            if error.code == 416:  # what has arrived is of another version
                partial.path.unlink(missing_ok=True)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ConnectionError as error:
            reason = str(error)
        failures = 0 if partial.arrived() > before else failures + 1
        if failures >= TRIES:
            raise UserError(
                f"{partial.url} cannot be downloaded ({reason}); the next try continues "
                f"after {partial.arrived():,} bytes: try again later, set DINO_MIRROR, or {by_hand}"
            )
        time.sleep(PAUSE * 2 ** max(0, failures - 1))


def _continue(partial: _Partial, report: Callable[[int, int | None], None]) -> bool:
    """One connection; whether the file is complete now."""
    request = urllib.request.Request(partial.url, headers={"User-Agent": "dino-ssl"})
    request.add_header("Accept-Encoding", "identity")
    start, mark = partial.arrived(), partial.validator()
    if start and mark:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", mark)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.path.unlink()  # the server sends another range than requested
            return False
        if not resumed:
            partial.begin(answer.headers)
        length = answer.headers.get("Content-Length")
        total = None if length is None else int(length) + (start if resumed else 0)
        with partial.path.open("ab") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                report(file.tell(), total)
    return total is None or partial.arrived() == total


# ------------------------------------------------------------------------------------ details
def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (PlainTextColumn(), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = not (ranks().main and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside; the system ends the claim of one that dies."""
    with path.open("a") as file:
        _claim(file)
        yield


def _claim(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
                return
            except OSError:  # it gives up after ten seconds
                continue
    fcntl.flock(file, fcntl.LOCK_EX)
