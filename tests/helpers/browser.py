"""Pages in headless Chromium, where playwright and a Chromium are installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
)
LIMIT = 60_000
"""Milliseconds that any step may take: machines of tests are busy."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=LIMIT)
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What a page asks for and complains about.

    Attributes:
        addresses: of all requests, but those for what is inside the page.
        complaints: errors of scripts and messages of the console, such as a broken policy.
    """

    def __init__(self, page: Any) -> None:
        self.addresses: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: self._note(socket.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, address: str) -> None:
        if not address.startswith(("data:", "blob:")):
            self.addresses.append(address)


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page whose script has run; it may ask for no other address and complain about nothing.

    `options` are those of `playwright.sync_api.Browser.new_context`.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(LIMIT)
    try:
        page = context.new_page()
        watch = Watch(page)
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        yield page
        assert watch.addresses == [address], watch.addresses
        assert watch.complaints == [], watch.complaints
    finally:
        context.close()
