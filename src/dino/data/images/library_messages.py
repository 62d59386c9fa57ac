"""What the libraries of image formats print: collected, to go into the defect of their image."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from torch.utils.data import get_worker_info

LOGGERS = ("PIL", "tifffile", "pydicom")


class Messages(logging.Handler):
    """Warnings, log records and, in workers, lines on stderr since the messages are collected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a log record."""
        self.lines.append(record.getMessage())

    @property
    def first(self) -> str:
        """The first message in one line, in brackets; empty if there is none."""
        return f" ({' '.join(self.lines[0].split())})" if self.lines else ""


@contextmanager
def python_warnings(messages: Messages) -> Iterator[None]:
    """Collect Python's warnings; what else is an error stays one."""
    with warnings.catch_warnings(record=True) as caught:
        for kind in (UserWarning, Image.DecompressionBombWarning):
            warnings.simplefilter("always", kind)
        try:
            yield
        finally:
            messages.lines += [str(warning.message) for warning in caught]


@contextmanager
def log_and_stderr(messages: Messages) -> Iterator[None]:
    """Collect log records and, in workers, where nothing else writes there, C code's stderr."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(messages)
    try:
        if get_worker_info() is None or not hasattr(os, "memfd_create"):
            yield
        else:
            with _stderr(messages):
                yield
    finally:
        for logger in loggers:
            logger.removeHandler(messages)


@contextmanager
def _stderr(messages: Messages) -> Iterator[None]:
    original = os.dup(2)
    with os.fdopen(os.memfd_create("stderr"), "rb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            messages.lines += file.read().decode(errors="replace").splitlines()
