"""Work beside the training: one piece at a time, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dino.train.background import Background


def fail() -> None:
    raise OSError("full")


def test_one_at_a_time_and_in_order() -> None:
    found: list[int] = []
    gate = threading.Event()

    def first() -> None:
        assert gate.wait(timeout=60)
        found.append(1)

    with Background() as background:
        background.start(first)
        background.check()  # it waits for nothing
        assert found == []
        gate.set()
        background.start(lambda: found.append(2))
        assert found[0] == 1
    assert found == [1, 2]


def test_an_error_is_raised_once_at_the_next_call() -> None:
    background = Background()
    for ask in (background.finish, lambda: background.start(print)):
        background.start(fail)
        with pytest.raises(OSError, match="full"):
            ask()
        background.finish()
    with pytest.raises(OSError, match="full"), background:
        background.start(fail)


def test_after_another_error_it_waits_and_after_ctrl_c_it_does_not() -> None:
    gate, found = threading.Event(), []

    def work() -> None:
        assert gate.wait(timeout=60)
        found.append(1)

    def run(function: Callable[[], object], error: BaseException) -> None:
        with background:
            background.start(function)
            raise error

    background = Background()
    with pytest.raises(KeyboardInterrupt):
        run(work, KeyboardInterrupt())
    assert found == []
    gate.set()
    background.finish()
    with pytest.raises(ValueError, match="other"):
        run(lambda: found.append(2), ValueError("other"))
    assert found == [1, 2]
