"""A small HTTP server of this machine with faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Files:
    """What is served, and how.

    Attributes:
        content: bytes by path.
        tag: the ETag of all, None for none.
        cut: how many bytes each of the next answers gives before the connection ends.
        ranges: whether ranges are served.
        answers: statuses of the next answers instead of files.
        stated: the length that is stated, "" for none; None states the right one.
        pause: seconds before an answer.
        requests: (path, Range header) of every request.
    """

    content: dict[str, bytes] = field(default_factory=dict)
    tag: str | None = '"one"'
    cut: list[int] = field(default_factory=list)
    ranges: bool = True
    answers: list[int] = field(default_factory=list)
    stated: str | None = None
    pause: float = 0.0
    requests: list[tuple[str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    files: Files

    def do_GET(self) -> None:
        files, path, span = self.files, self.path, self.headers.get("Range")
        files.requests.append((path, span))
        time.sleep(files.pause)
        if files.answers:
            self.send_error(files.answers.pop(0))
            return
        if path not in files.content:
            self.send_error(404)
            return
        data = files.content[path]
        start = 0
        if span and files.ranges and self.headers.get("If-Range") == files.tag:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if files.tag:
            self.send_header("ETag", files.tag)
        length = str(len(data) - start) if files.stated is None else files.stated
        if length:
            self.send_header("Content-Length", length)
        self.end_headers()
        end = start + files.cut.pop(0) if files.cut else len(data)
        self.wfile.write(data[start:end])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, Files]]:
    """The address of a running server, and what it serves."""
    files = Files()
    handler = type("Own", (Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", files
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=60)
