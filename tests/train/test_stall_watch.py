"""A run that stands still says so, once for each activity."""

from __future__ import annotations

import threading

import pytest

from dino import rendezvous
from dino.rendezvous import doing
from dino.train.stall_watch import StallWatch


def test_what_takes_too_long_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "others", lambda: "; rank 1 was reading the images of step 3")
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    with StallWatch(say, 0.3), doing("saving step 2"):
        assert heard.wait(timeout=60)
        heard.clear()
        assert not heard.wait(timeout=0.9)
        with doing("reading the images of step 3"):
            assert heard.wait(timeout=60)
    first, second = said
    assert first.startswith("standing still: saving step 2 takes more than")
    assert first.endswith("of step 3: check the disk, or the network share, of the run folder")
    assert "reading the images of step 3 takes" in second


def test_what_goes_on_is_not_said() -> None:
    said: list[str] = []
    pause = threading.Event()
    with StallWatch(said.append, 6.0):
        for step in range(5):
            with doing(f"training step {step}"):
                pause.wait(timeout=0.05)
    assert said == []
