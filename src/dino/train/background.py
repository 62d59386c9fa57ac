"""Work beside the training: one piece at a time, in a thread, whose error ends the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress


class Background:
    """Runs one function at a time in a thread.

    What it works on must not change: the caller hands over copies. As a context it waits for the
    function at the end, also after an error, but not after Ctrl-C.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            with suppress(Exception):  # the first error is the one to show
                self.finish()

    def start(self, function: Callable[[], object]) -> None:
        """Start a function, once the one before has ended; raises as `finish` does."""
        self.finish()

        def work() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="dino-background", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the function has ended; raises its error."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise the error of a function that has ended; wait for nothing."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread, error = None, self._error
        if error is not None:
            self._error = None
            raise error
