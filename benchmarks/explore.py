"""The page of `dino explore`: its size, and the time from a move of the mouse to the new map.

    python benchmarks/explore.py photos/ --images 4

The page in one file: a ViT-S/8 with random weights, whose features are as many as those of a
trained one, and images of 60 x 60 patches. Headless Chromium moves the mouse from patch to patch.
"ms to draw" is the work of the page for a move: all cosines, colours and marks. "ms to the frame"
goes from the event of the mouse until the browser has painted the frame after it.

The served page: "ms of a click" is an answer of the server for one photograph of 480 px, of which
size or block have changed, by a ViT of 4 blocks of 128 numbers with patches of 16 px; "ms of a
query" the search among `--entries` features of 384 numbers that are mapped from a file. Beside the
time is that of the processor, which other programs on the machine change less.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console

import dino
from dino.data.images.decode import as_picture
from dino.data.sources.open import open_source
from dino.features.command import number_table
from dino.features.search import nearest
from dino.show.explorer.server import Served

SIDE = 480

WATCH = """() => {
    window.frames_ms = [];
    const surface = document.querySelector(".surface");
    surface.addEventListener("pointermove", (event) => {
        requestAnimationFrame(() => {
            const channel = new MessageChannel();
            channel.port1.onmessage = () =>
                window.frames_ms.push(performance.now() - event.timeStamp);
            channel.port2.postMessage(null);
        });
    });
}"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the page of `dino explore`."""

    data: tyro.conf.Positional[str]
    """Photographs, cropped to squares."""
    images: int = 4
    """How many of them the page holds."""
    arch: str = "vit_small"
    """With patches of 8 px."""
    moves: int = 200
    """Moves of the mouse."""
    clicks: int = 30
    """Answers of the server, and queries."""
    entries: int = 1_000_000
    """Features that a query is compared with."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Of PyTorch."""


def squares(data: str, count: int) -> list[Image.Image]:
    source = open_source(data)
    found = []
    for index in range(count):
        picture = as_picture(source[index])
        side = min(picture.size)
        found.append(picture.crop((0, 0, side, side)).resize((2 * SIDE, 2 * SIDE)))
    return found


def moves(path: Path, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds to draw, and to the frame, of each move."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page: Any = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        page.evaluate(WATCH)
        box = page.locator(".surface").first.bounding_box()
        for index in range(count + 20):  # the first are compiled
            x, y = (0.02 + 0.96 * (index * step % 1) for step in (0.618, 0.414))
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            page.wait_for_timeout(25)
        drawn = page.evaluate("performance.getEntriesByName('draw').map((one) => one.duration)")
        frames = page.evaluate("window.frames_ms")
        browser.close()
    return drawn[-count:], frames[-count:]


def timed(count: int, work: Callable[[int], object]) -> dict[str, list[float]]:
    """Milliseconds of the clock and of the processor of each call; the first is left out."""
    wall, processor = [], []
    for number in range(count + 1):
        start, spent = time.perf_counter(), time.process_time()
        work(number)
        wall.append(1000 * (time.perf_counter() - start))
        processor.append(1000 * (time.process_time() - spent))
    return {"": wall[1:], ", processor": processor[1:]}


def clicks(picture: Image.Image, count: int) -> dict[str, list[float]]:
    options = {"embed_dim": 128, "depth": 4, "heads": 4, "patch_size": 16, "image_size": 64}
    network = dino.create("vit_tiny", **options).eval()
    served = dino.explore(network, picture, size=SIDE, served=True)
    assert isinstance(served, Served)

    def click(number: int) -> None:
        # More pairs of size and block than the server keeps: nothing is answered from memory.
        size, block = SIDE - 16 * (number // 4 % 8), 1 + number % 4
        body = {"images": ["given-0"], "network": "weights", "size": size, "block": block}
        request = urllib.request.Request(f"{served.address}patches", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()

    found = timed(count, click)
    served.stop()
    return found


def queries(entries: int, count: int, folder: Path) -> dict[str, list[float]]:
    path = folder / "features.npy"
    rows = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(entries, 384))
    for start in range(0, entries, 2**16):
        some = torch.randn(min(2**16, entries - start), 384)
        rows[start : start + len(some)] = torch.nn.functional.normalize(some, dim=1)
    rows.flush()
    bank = torch.from_numpy(np.load(path, mmap_mode="c"))
    return timed(count, lambda _: nearest(torch.randn(1, 384), bank, 24, unit=True))


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    network = dino.create(settings.arch, patch_size=8).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        start = time.perf_counter()
        page = dino.explore(network, squares(settings.data, settings.images), path, size=SIDE)
        seconds = time.perf_counter() - start
        drawn, frames = moves(path, settings.moves)
        measured = {"ms to draw": drawn, "ms to the frame": frames}
        picture = squares(settings.data, 1)[0].resize((SIDE, SIDE))
        for what, values in clicks(picture, settings.clicks).items():
            measured[f"ms of a click{what}"] = values
        for what, values in queries(settings.entries, settings.clicks, Path(folder)).items():
            measured[f"ms of a query{what}"] = values
    rows = {}
    for name, values in measured.items():
        quantiles = statistics.quantiles(values, n=100)
        rows[name] = [f"{quantiles[p - 1]:.1f}" for p in (50, 95, 99)]
    Console().print(number_table("dino explore", ["", "median", "95 %", "99 %"], rows))
    Console().print(f"{page.summary}, written in {seconds:.0f} s", soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
