"""The page of `dino report` in Chromium: reloads, frames, keys, widths, dark and light."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import LIMIT, Watch, chromium
from helpers.reports import KNN, VIT, metrics
from PIL import Image, ImageFilter, ImageOps

from dino.models.create import create
from dino.show.report import photographs, similarity
from dino.show.report.report import report
from dino.weights.load import save


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five images of noise."""
    folder = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(5):
        noise = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6))
        ImageOps.autocontrast(smooth).save(folder / "images" / f"{index}.png")
    about = {"recipe": "small_data", "data": str(folder / "images")}
    settings = {"head.prototypes": 64, "run.seed": 0, "a.long.name": "word " * 40}
    run = folder / "run"
    run.mkdir()
    config = {"about": about, "defining": settings, "total_steps": 50}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(5)))
    (run / "results.json").write_text(json.dumps({"knn": KNN}))
    save(create(**VIT), run / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for module in (photographs, similarity):
            patch.setattr(module, "SIDE", 32)
        report(run)
        report([run, copy(run)], out=folder / "runs.html")
    return run


def copy(run: Path) -> Path:
    other = run.with_name("other")
    other.mkdir()
    for name in ("config.json", "metrics.jsonl", "teacher.safetensors"):
        (other / name).write_bytes((run / name).read_bytes())
    return other


def open_page(browser: Any, path: Path, **options: Any) -> tuple[Any, Watch]:
    context = browser.new_context(**options)
    context.set_default_timeout(LIMIT)
    page = context.new_page()
    watch = Watch(page)
    page.goto(path.as_uri())
    return page, watch


def test_a_page_loads_itself_again_at_the_same_place(browser: Any, run: Path) -> None:
    report(run, images=False, refresh=1, out=run / "live.html")
    page, watch = open_page(browser, run / "live.html", viewport={"width": 600, "height": 300})
    page.locator("summary").last.scroll_into_view_if_needed()
    page.locator("summary").last.click()
    place = page.evaluate("scrollY")
    assert place > 300
    text = (run / "live.html").read_text().replace("Verdict: good", "Verdict: new")
    (run / "live.html").write_text(text)
    page.get_by_role("heading", name="Verdict: new").wait_for()
    assert page.evaluate("scrollY") == pytest.approx(place, abs=2)
    assert page.locator("details").last.evaluate("one => one.open")
    assert watch.complaints == []
    page.context.close()


def test_the_similarity_of_patches_follows_the_keys(browser: Any, run: Path) -> None:
    page, watch = open_page(browser, run / "report.html")
    frame = page.frame_locator("iframe[title='Similar patches']")
    page.locator("iframe").scroll_into_view_if_needed()
    frame.locator("body[data-ready]").wait_for()
    surface = frame.locator(".surface").first
    surface.focus()
    page.keyboard.press("ArrowRight")
    frame.get_by_role("status").get_by_text("of 0.png").wait_for()
    assert frame.locator("figure").count() == photographs.PHOTOGRAPHS
    assert watch.complaints == []
    assert watch.addresses == [(run / "report.html").as_uri()]
    page.context.close()


@pytest.mark.parametrize("name", ["run/report.html", "runs.html"])
@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_pages_of_any_width_need_no_sideways_scrolling(
    name: str, width: int, browser: Any, run: Path
) -> None:
    page, _ = open_page(browser, run.parent / name, viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = """[...document.querySelectorAll("p, td, th, figcaption, summary")]
        .filter((one) => parseFloat(getComputedStyle(one).fontSize) < 11).length"""
    assert page.evaluate(small) == 0
    letters = """Math.min(...[...document.querySelectorAll("svg text")].map((one) =>
        parseFloat(getComputedStyle(one).fontSize) * one.getScreenCTM().a))"""
    assert page.evaluate(letters) >= 9.5
    page.context.close()


def test_pictures_and_tables_have_names_for_screen_readers(browser: Any, run: Path) -> None:
    page, _ = open_page(browser, run.parent / "runs.html")
    tree = page.locator("body").aria_snapshot()
    for line in tree.splitlines():
        role = line.strip(" -").split(" ")[0].rstrip(":")
        if role in ("img", "columnheader", "rowheader"):
            assert '"' in line or line.strip() == "- columnheader", line
    assert 'rowheader "verdict"' in tree
    assert 'img "A: ' in tree
    page.context.close()


def test_dark_and_light(browser: Any, run: Path) -> None:
    for scheme, ground in (("dark", "rgb(20, 22, 26)"), ("light", "rgb(251, 250, 247)")):
        page, _ = open_page(browser, run / "report.html", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        page.context.close()
