"""The served page of `dino explore` in Chromium: uploads, neighbours, the lasso, a training."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.browser import LIMIT, Watch, chromium
from PIL import Image, ImageFilter

import dino
from dino.features.folder_map import folder_map
from dino.features.index import Index, read_index
from dino.models.backbone import Backbone
from dino.show.explorer.page import explore
from dino.show.explorer.patches import patch_features
from dino.show.explorer.server import Served
from dino.weights.load import save

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

SIDE = 64
PATCHES = SIDE // 8


class Site(NamedTuple):
    served: Served
    network: Backbone
    index: Index
    run: Path
    upload: Path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def small_network(seed: int) -> Backbone:
    torch.manual_seed(seed)
    options = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32}
    return dino.create("vit_tiny", **options).eval()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    (root / "photos").mkdir()
    (root / "run").mkdir()
    for number in range(30):
        picture(number).save(root / "photos" / f"{number:02}.png")
    picture(7).save(root / "<i>mine.png")
    (root / "run" / "config.json").write_text('{"total_steps": 40}')
    (root / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n')
    network = small_network(0)
    folder, index = root / "photos", root / "index"
    served = explore(network, size=SIDE, folder=folder, index=index, run=root / "run", images=None)
    assert isinstance(served, Served)
    yield Site(served, network, read_index(index), root / "run", root / "<i>mine.png")
    served.stop()


@contextmanager
def visited(browser: Any, site: Site, complaints: int = 0, **options: Any) -> Iterator[Any]:
    """The page, which may ask for no address but its own, and complain about refused requests."""
    context = browser.new_context(accept_downloads=True, **options)
    context.set_default_timeout(LIMIT)
    try:
        page = context.new_page()
        watch = Watch(page)
        page.goto(site.served.address)
        page.wait_for_selector("body[data-ready]")
        page.wait_for_selector("#map[data-ready]")
        yield page
        assert all(one.startswith(site.served.address) for one in watch.addresses)
        assert len(watch.complaints) == complaints, watch.complaints
    finally:
        context.close()


def until(page: Any, condition: str, argument: Any = None) -> None:
    """Wait for a condition. (`wait_for_function` needs eval, which the page's policy forbids.)"""
    for _ in range(LIMIT // 100):
        if page.evaluate(condition, argument):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"in vain: {condition}")


def settled(page: Any) -> None:
    """Wait until the page shows what was asked of it last."""
    until(page, "!open.working && open.shown === open.asked")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")


def upload(page: Any, *files: Path) -> None:
    before = page.evaluate("open.asked")
    page.locator("#file").set_input_files([str(file) for file in files])
    until(page, f"open.asked > {before}")
    settled(page)


def values(page: Any, image: int) -> np.ndarray:
    """The map of an image, as the page computed it."""
    return np.array(page.evaluate(f"[...state.images[{image}].values]"))


def cosines(network: Backbone, image: Image.Image, patch: int, size: int) -> np.ndarray:
    features = patch_features(network, "", image, size).features
    rows = F.normalize(features.flatten(1).double(), dim=0)
    return (rows[:, patch] @ rows).numpy()


def test_an_upload_is_compared_patch_by_patch_and_finds_its_neighbours(
    browser: Any, site: Site
) -> None:
    with visited(browser, site) as page:
        assert not page.locator("#controls").is_visible()
        upload(page, site.upload)
        assert page.locator("figcaption .name").all_inner_texts() == ["<i>mine.png"]
        page.wait_for_selector("#grid li:nth-child(24)")
        assert page.locator("#grid-title").inner_text() == "Nearest to <i>mine.png"
        feature = F.normalize(torch.from_numpy(site.network.embed(site.upload)), dim=1)
        expected = (site.index.features @ feature[0]).sort(descending=True)
        until(page, "document.querySelector('#grid button').title !== ''")
        titles = page.locator("#grid button").evaluate_all("(all) => all.map((one) => one.title)")
        assert titles == [site.index.name(row) for row in expected.indices[:24].tolist()]
        shown = [float(text) for text in page.locator("#grid span").all_inner_texts()]
        assert shown == pytest.approx(expected.values[:24].tolist(), abs=0.006)
        error = page.evaluate("state.content.error")
        for row, column in ((1, 2), (6, 5)):
            box = page.locator(".surface").bounding_box()
            x, y = (
                box["x"] + (column + 0.5) / PATCHES * box["width"],
                box["y"] + (row + 0.5) / PATCHES * box["height"],
            )
            page.mouse.move(x, y)
            settled(page)
            exact = cosines(site.network, picture(7), row * PATCHES + column, SIDE)
            assert np.abs(values(page, 0) - exact).max() <= error + 1e-6
        page.locator("#grid button").nth(1).click()  # opens it beside the upload
        until(page, "state.images.length === 2")
        page.get_by_role("button", name="Close <i>mine.png").click()
        until(page, "state.images.length === 1")
        assert page.locator("figcaption .name").inner_text() == titles[1]


def test_size_block_and_network_change_the_features(browser: Any, site: Site) -> None:
    save(small_network(1), site.run / "teacher.safetensors", {"step": 2})
    with visited(browser, site) as page:
        upload(page, site.upload)
        page.locator(".surface").click(position={"x": 5, "y": 5})  # pins the first patch
        for name, value, network, size, block in (
            ("block", "1", site.network, SIDE, 1),
            ("size", "32", site.network, 32, 1),
            ("block", "2", site.network, 32, 2),
        ):
            page.locator(f"#{name}").fill(value)
            page.wait_for_timeout(200)
            settled(page)
            exact = cosines(network.first_blocks(block), picture(7), 0, size)
            error = page.evaluate("state.content.error") + 1e-6
            assert np.abs(values(page, 0) - exact).max() <= error
            assert page.locator(".marks .like").count() == 1
        for seed in (1, 2):
            if seed == 1:
                page.locator("#network").select_option("run")
                page.wait_for_timeout(200)
            else:
                save(small_network(2), site.run / "teacher.safetensors", {"step": 3})
                page.evaluate("ask('run').then(showRun)")
            settled(page)
            exact = cosines(small_network(seed), picture(7), 0, 32)
            until(
                page,
                """([exact, error]) => exact.every((value, i) =>
                    Math.abs(state.images[0].values[i] - value) < error)""",
                [exact.tolist(), page.evaluate("state.content.error") + 1e-4],
            )


def places(page: Any, site: Site) -> np.ndarray:
    """Where the images are on the map's canvas, in its pixels, computed in Python."""
    shown = (folder_map(site.index) * 65535).round() / 65535
    cell = page.evaluate("CELL")
    size = page.evaluate("[mapSize().width, mapSize().height]")
    return np.array(shown * (np.array(size) - 2 * cell) + cell)


def polygon_around(center: np.ndarray, radius: float) -> list[tuple[float, float]]:
    turns = [math.tau * step / 24 for step in range(25)]
    return [(center[0] + radius * math.cos(t), center[1] + radius * math.sin(t)) for t in turns]


def test_the_lasso_selects_what_it_surrounds_and_writes_a_list(browser: Any, site: Site) -> None:
    with visited(browser, site) as page:
        canvas = page.locator("#map canvas")
        canvas.scroll_into_view_if_needed()
        spots, box = places(page, site), canvas.bounding_box()
        line = polygon_around(spots[4], 130)
        page.mouse.move(box["x"] + line[0][0], box["y"] + line[0][1])
        page.mouse.down()
        for x, y in line:
            page.mouse.move(box["x"] + x, box["y"] + y)
        page.mouse.up()
        away = np.hypot(*(spots - spots[4]).T)
        certain = np.abs(away - 130) > 4  # the line has 24 corners
        assert certain.sum() > 20
        chosen = set(page.evaluate("[...folder.chosen]"))
        assert 0 < len(chosen) < 30
        for row in range(30):
            if certain[row]:
                assert (row in chosen) == (away[row] < 130)
        assert page.locator("#grid-title").inner_text() == f"{len(chosen)} images selected"
        assert page.locator("#grid li").count() == len(chosen)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save list").click()
        with Path(download.value.path()).open(newline="") as file:
            lines = [path for (path,) in csv.reader(file)]
        assert lines == ["path", *(site.index.paths[row] for row in sorted(chosen))]


def test_the_map_shows_thumbnails_and_is_used_by_keys(browser: Any, site: Site) -> None:
    with visited(browser, site) as page:
        until(
            page, "[...folder.thumbnails.values()].every((one) => one.complete && one.naturalWidth)"
        )
        page.wait_for_timeout(100)
        drawn = page.evaluate("folder.drawn.map(({ row, x, y }) => [row, x, y])")
        assert len(drawn) >= 5
        shown = Image.open(io.BytesIO(page.locator("#map canvas").screenshot())).convert("RGB")
        for row, x, y in drawn:
            pixel = shown.getpixel((round(x) + 1, round(y) + 1))  # the border is one pixel wide
            with Image.open(site.index.paths[row]) as image:
                center = np.asarray(image)[24:40, 24:40].reshape(-1, 3).astype(int)
            assert np.abs(center - pixel).sum(axis=1).min() < 60, row
        page.locator("#map canvas").focus()
        for key in ("ArrowRight", "Shift+ArrowDown", "+", "+", "+", "Enter"):
            page.keyboard.press(key)
        circle = page.evaluate("[folder.circle.x, folder.circle.y, folder.circle.radius]")
        away = np.hypot(*(places(page, site) - circle[:2]).T)
        assert set(page.evaluate("[...folder.chosen]")) == set(np.flatnonzero(away <= circle[2]))
        page.keyboard.press("Escape")
        before = page.evaluate("onMap(0)")
        page.get_by_role("button", name="Zoom in").click()
        assert page.evaluate("onMap(0)") != before


def test_the_curves_of_a_training_grow(browser: Any, site: Site) -> None:
    with visited(browser, site) as page:
        page.wait_for_selector("#curves svg")
        with (site.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 9, "loss": 3.25}) + "\n")
        page.get_by_role("img", name="Loss: 5 at first, 3.25 at step 9").wait_for()
        assert "step 9 of 40" in page.locator("#training-about").inner_text()


def test_a_bad_upload_is_a_sentence_and_no_markup(browser: Any, site: Site, tmp_path: Path) -> None:
    bad = tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_bytes(b"no picture")
    with visited(browser, site, complaints=1) as page:
        page.locator("#file").set_input_files([str(bad)])
        page.get_by_role("alert").get_by_text("cannot be read as an image").wait_for()
        assert bad.name in page.get_by_role("alert").inner_text()
        upload(page, site.upload)
        assert page.locator("figure .surface").count() == 1


def test_two_users_see_only_their_own_pictures(browser: Any, site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    picture(99).save(other)
    with visited(browser, site) as first, visited(browser, site) as second:
        upload(first, site.upload)
        upload(second, other)
        first.reload()
        first.wait_for_selector("body[data-ready]")
        assert first.locator(".surface").count() == 0
        assert second.locator("figcaption .name").all_inner_texts() == ["other.png"]
        first.wait_for_selector("#map[data-ready]")


@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_it_fits_any_screen(width: int, browser: Any, site: Site) -> None:
    size = {"width": width, "height": 900}
    with visited(browser, site, viewport=size, color_scheme="dark") as page:
        upload(page, site.upload)
        page.wait_for_selector("#grid li:nth-child(24)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#map canvas").bounding_box()["width"] >= min(340, width - 60)
        unnamed = page.locator("button, select, input:not([hidden])").evaluate_all(
            """(all) => all.filter((one) => !(one.ariaLabel || one.textContent.trim()
                || one.closest("label")?.textContent.trim())).map((one) => one.outerHTML)"""
        )
        assert unnamed == []


def test_another_site_cannot_drive_it(browser: Any, site: Site, tmp_path: Path) -> None:
    page = browser.new_page()
    page.route("http://other.example/**", lambda route: route.fulfill(body="<body></body>"))
    page.goto("http://other.example/")
    address = site.served.address
    assert page.evaluate(f"fetch('{address}run').then(() => 'read', () => 'refused')") == "refused"
    loads = f"""new Promise((done) => {{ const image = new Image();
        image.onload = () => done("shown"); image.onerror = () => done("refused");
        image.src = "{address}thumbnails/0"; }})"""
    assert page.evaluate(loads) == "refused"
    page.close()
