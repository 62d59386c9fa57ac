"""Ranges of bytes from large files, local ones and those that fsspec reaches.

All functions may be used by threads, and by processes that were forked or spawned: reading moves no
position that others share.
"""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

from dino.data.sources.base import needs_extra
from dino.files import UserError

OPEN_FILES = 64
"""Local files that a process holds open at most; twice as many shards as one window has."""
LOCAL_AHEAD, READ_AHEAD = 2**13, 2**22
"""Bytes that `RangeFile` reads at once, of local files and over a network."""
LONGEST_READ = 2**26
"""Bytes that `RangeFile` reads at most: longer headers and labels are damage."""
TRIES, PAUSE = 3, 0.5
"""Requests before an error is final, and seconds before the second one; then twice as long."""

# Keys of a file's version in the file systems of fsspec, in lower case.
_VERSIONS = (
    *("etag", "mtime", "lastmodified", "last-modified", "last_modified", "updated", "created"),
    *("content-md5", "contentmd5", "md5hash", "crc32c", "generation", "ino"),
)


def is_remote(url: str) -> bool:
    """Whether it is a URL (of fsspec, perhaps chained) and not a path."""
    return "://" in url


def _examine(url: str) -> tuple[int, str]:
    """Size of a file in bytes, and its version; "" where the server states none."""
    try:
        if not is_remote(url):
            status = os.stat(url)  # noqa: PTH116, `url` is a string of many
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{url} is no regular file: shards must be files")
            return status.st_size, _version(status)
        system, path = _system(url)
        about = {key.lower(): value for key, value in _with_retries(system.info, path).items()}
    except FileNotFoundError:
        raise UserError(f"{url} does not exist: name --data shards that are there") from None
    except OSError as error:
        raise UserError(f"{url} cannot be read: {_reason(error)}") from error
    if about.get("type") == "directory" or about.get("size") is None:
        raise UserError(f"{url} is no file of known size: shards must be files")
    version = {key: str(about[key]) for key in _VERSIONS if about.get(key)}
    return int(about["size"]), str({"size": about["size"], **version}) if version else ""


def read_range(url: str, version: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on; fewer where the file ends.

    Raises:
        UserError: if a local file has another version, or a server supports no ranges.
        OSError: if the file cannot be read.
    """
    if size == 0:
        return b""
    if not is_remote(url):
        return _local_file(url, version).read_at(offset, size)
    system, path = _system(url)
    content: bytes = _with_retries(system.cat_file, path, start=offset, end=offset + size)
    if len(content) > size:
        raise UserError(
            f"the server of {url} sends entire files where ranges are requested: fetch the shards, "
            f"as in simplecache::{url}"
        )
    return content


class RangeFile:
    """A file of `size` bytes that is read from front to back, by ranges larger than each read.

    Raises:
        UserError: if the file is missing or cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.size, self.version = _examine(url)
        self._ahead = READ_AHEAD if is_remote(url) else LOCAL_AHEAD
        self._position = self._start = 0
        self._buffer = b""

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int) -> int:
        """Go to a position, counted from the start."""
        self._position = offset
        return offset

    def read(self, count: int) -> bytes:
        """The next bytes; fewer where the file ends.

        Raises:
            ValueError: for a negative number or more than `LONGEST_READ`.
            UserError: if the file cannot be read, or ends too early.
        """
        if not 0 <= count <= LONGEST_READ:
            raise ValueError(f"{count} bytes at once")
        left = max(0, self.size - self._position)
        begin, count = self._position - self._start, min(count, left)
        if begin < 0 or begin + count > len(self._buffer):
            self._fill(min(max(count, self._ahead), left))
            begin = 0
        self._position += count
        return self._buffer[begin : begin + count]

    def _fill(self, count: int) -> None:
        try:
            self._buffer = read_range(self.url, self.version, self._position, count)
        except OSError as error:
            raise UserError(f"{self.url} cannot be read: {_reason(error)}") from error
        if len(self._buffer) < count:
            raise UserError(
                f"{self.url} gave {len(self._buffer)} bytes of {count} at {self._position}: "
                "start again when it is no longer being written"
            )
        self._start = self._position


# ---------------------------------------------------------------------------------- local
class _LocalFile(io.FileIO):
    """A file that is closed with the last reference to it."""

    def __init__(self, path: str, version: str) -> None:
        super().__init__(path)
        self._lock = Lock()
        if version != _version(os.fstat(self.fileno())):
            self.close()
            raise UserError(f"{path} has changed since the start: start again, to read it anew")

    def __del__(self) -> None:
        self.close()

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`; fewer where the file ends."""
        if not hasattr(os, "pread"):  # Windows
            with self._lock:
                self.seek(offset)
                return self.read(size)
        content = b""
        while part := os.pread(self.fileno(), size - len(content), offset + len(content)):
            content += part  # at most 2 GiB
        return content


# The version is part of the key: a file that was replaced is opened anew.
_local_file = lru_cache(maxsize=OPEN_FILES)(_LocalFile)


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


# ---------------------------------------------------------------------------------- fsspec
def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; fsspec keeps one for each process and thread."""
    with needs_extra("shards", url):
        from fsspec.core import url_to_fs
    try:
        return tuple(url_to_fs(url))
    except (ImportError, ValueError) as error:  # a protocol whose package is missing, or unknown
        raise UserError(f"{url} cannot be read: {_reason(error)}") from error


def _with_retries(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call, and again after a pause where a server may only be busy; raises OSError."""
    for attempt in range(TRIES):
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system raises different ones
            if attempt == TRIES - 1:
                raise OSError(_reason(error)) from error
            time.sleep(PAUSE * 2**attempt)


def _reason(error: BaseException) -> str:
    """The message of an error of a library, in one line."""
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or " ".join(str(error).split()) or type(error).__name__
