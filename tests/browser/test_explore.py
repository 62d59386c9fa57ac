"""The page of `dino explore` in Chromium: maps, pins, masks, keys, touch, and no requests."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.browser import Watch, chromium, opened
from PIL import Image, ImageFilter, ImageOps

import dino
from dino.data.images.map_overlay import COLORS, ColorMap
from dino.models.attention import mass_mask
from dino.models.backbone import Backbone
from dino.show.explorer.page import explore
from dino.show.explorer.patches import PatchFeatures, named_images, patch_features
from dino.show.patch_pca import components

SIZES = {"a.png": (96, 72), "<b>.png": (80, 80), "c.png": (200, 130)}
SIDE = 72
GRIDS = [(9, 12), (9, 9), (9, 14)]
MINUS = "\N{MINUS SIGN}"


class Explored(NamedTuple):
    """A page and what Python knows of its images."""

    address: str
    images: list[PatchFeatures]
    error: float

    def cosines(self, image: int, patch: int) -> list[np.ndarray]:
        """The exact cosines of a patch with all patches of each image."""
        rows = [F.normalize(one.features.flatten(1).double(), dim=0) for one in self.images]
        return [(rows[image][:, patch] @ other).numpy() for other in rows]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def network(arch: str = "vit_tiny", **options: Any) -> Backbone:
    torch.manual_seed(0)
    return dino.create(arch, **options).eval()


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Explored:
    folder = tmp_path_factory.mktemp("page")
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6))
        ImageOps.autocontrast(smooth).save(folder / name)
    files = [folder / name for name in SIZES]
    vit = network(embed_dim=24, depth=2, heads=2, patch_size=8, image_size=32)
    page = explore(vit, files, folder / "page.html", size=SIDE)
    images = [
        patch_features(vit, name, sample, SIDE)
        for name, sample in named_images(files, vit.preprocessing.pixels)
    ]
    assert [one.features.shape[1:] for one in images] == GRIDS
    stated = float(page.summary.split("at most ")[1].split()[0])
    return Explored((folder / "page.html").as_uri(), images, stated)


# --------------------------------------------------------------------------------- the page's parts
def canvas(page: Any, index: int) -> np.ndarray:
    """The colours [h, w, 4] of a map, as the canvas holds them."""
    rows, columns = GRIDS[index]
    values = page.evaluate(
        """([index, width, height]) => {
            const canvas = document.querySelectorAll(".surface canvas")[index];
            return [...canvas.getContext("2d").getImageData(0, 0, width, height).data];
        }""",
        [index, columns, rows],
    )
    return np.array(values, np.uint8).reshape(rows, columns, 4)


def table(colors: ColorMap) -> np.ndarray:
    """The 256 colours of a map."""
    given = np.array([list(bytes.fromhex(color)) for color in COLORS[colors].split()])
    places = np.linspace(0, len(given) - 1, 256)
    channels = [np.interp(places, np.arange(len(given)), channel) for channel in given.T]
    return np.floor(np.stack(channels, axis=-1) + 0.5)


def assert_shows(pixels: np.ndarray, values: np.ndarray, colors: ColorMap, error: float) -> None:
    """The colours are those of values from 0 to 1, each within `error`."""
    distances = np.abs(pixels.reshape(-1, 1, pixels.shape[-1])[..., :3] - table(colors)).sum(axis=2)
    assert distances.min(axis=1).max() <= 1
    found = distances.argmin(axis=1) / 255
    # A colour stands for 1 / 256 of the range, and its neighbours may be as near by rounding.
    assert np.abs(found - values.ravel().clip(0, 1)).max() <= error + 1.5 / 256


def number(text: str) -> float:
    """The last number of a text of the page."""
    return float(text.split()[-1].replace(MINUS, "-"))


def draw(page: Any) -> None:
    """Wait for the next frame."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")


def point(page: Any, image: int, patch: int) -> tuple[float, float]:
    """The centre of a patch on the screen."""
    rows, columns = GRIDS[image]
    box = page.locator(".surface").nth(image).bounding_box()
    row, column = divmod(patch, columns)
    return (
        box["x"] + (column + 0.5) / columns * box["width"],
        box["y"] + (row + 0.5) / rows * box["height"],
    )


def hover(page: Any, image: int, patch: int) -> None:
    page.mouse.move(*point(page, image, patch))
    draw(page)


def click(page: Any, image: int, patch: int, key: str | None = None) -> None:
    hover(page, image, patch)
    if key:
        page.keyboard.down(key)
    page.mouse.click(*point(page, image, patch))
    if key:
        page.keyboard.up(key)
    draw(page)


def press(page: Any, key: str) -> None:
    page.keyboard.press(key)
    draw(page)


def choose(page: Any, group: str, value: str) -> None:
    page.locator(f"label:has([name={group}][value='{value}'])").click()
    draw(page)


def set_slider(page: Any, name: str, value: int) -> None:
    page.locator(f"#{name}").fill(str(value))
    draw(page)


def saved(page: Any, image: int, what: str) -> tuple[str, Image.Image]:
    """The name and the picture that a button of an image saves."""
    with page.expect_download() as download:
        page.locator("figure").nth(image).get_by_role("button", name=f"Save the {what}").click()
    with Image.open(download.value.path()) as picture:
        return download.value.suggested_filename, picture.copy()


# -------------------------------------------------------------------------------------- similarity
@pytest.mark.parametrize(("image", "patch"), [(0, 40), (2, 95)])
def test_the_map_is_that_of_the_patch_under_the_mouse(
    image: int, patch: int, browser: Any, explored: Explored
) -> None:
    with opened(browser, explored.address) as page:
        page.locator("#full").check()
        before = [canvas(page, index) for index in range(3)]
        hover(page, image, patch)
        for index, values in enumerate(explored.cosines(image, patch)):
            pixels = canvas(page, index)
            assert (pixels != before[index]).any()
            assert_shows(pixels, values, "inferno", explored.error)


def test_the_screen_shows_the_map(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        page.locator("#full").check()
        set_slider(page, "strength", 100)
        hover(page, 0, 17)
        for index, values in enumerate(explored.cosines(0, 17)):
            rows, columns = GRIDS[index]
            data = page.locator(".surface").nth(index).screenshot()
            picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            down = ((np.arange(rows) + 0.5) / rows * len(picture)).astype(int)
            right = ((np.arange(columns) + 0.5) / columns * picture.shape[1]).astype(int)
            patches = np.arange(rows * columns)
            far = patches // columns < rows - 3  # from marks, which the last rows may hold
            marked = [17, values.argmax()]
            for mark in marked:
                distance = np.hypot(
                    patches // columns - mark // columns, patches % columns - mark % columns
                )
                far &= distance > 2
            assert far.sum() > 20
            pixels = picture[down][:, right].reshape(-1, 3)
            assert_shows(pixels[far], values[far], "inferno", explored.error)


def test_the_legend_states_the_values_of_the_colors(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        hover(page, 1, 70)
        low, high = (number(page.locator(f"#{end}").inner_text()) for end in ("low", "high"))
        values = np.concatenate(explored.cosines(1, 70))
        assert low == pytest.approx(np.quantile(values, 0.02, method="inverted_cdf"), abs=0.02)
        assert high == pytest.approx(np.quantile(values, 0.998, method="inverted_cdf"), abs=0.02)
        for index, exact in enumerate(explored.cosines(1, 70)):
            shares = (exact - low) / (high - low)
            tolerance = (explored.error + 0.01) / (high - low)
            assert_shows(canvas(page, index), shares, "inferno", tolerance)
        notes = page.locator(".note").all_inner_texts()
        assert notes[1] == "row 8, column 8"
        for index in (0, 2):
            best = explored.cosines(1, 70)[index].max()
            assert number(notes[index]) == pytest.approx(best, abs=explored.error + 0.005)


# -------------------------------------------------------------------------------------------- masks
def test_pins_cut_out_a_mask_which_is_saved(browser: Any, explored: Explored) -> None:
    like, unlike, threshold = [(0, 90), (1, 55)], [(2, 67)], 0.6
    with opened(browser, explored.address, accept_downloads=True) as page:
        for pin in like:
            click(page, *pin)
        for pin in unlike:
            click(page, *pin, key="Shift")
        assert page.locator(".marks .like").count() == 2
        assert page.locator(".marks .unlike").all_inner_texts() == [MINUS]
        choose(page, "mode", "mask")
        set_slider(page, "threshold", round(100 * threshold))
        for index, grid in enumerate(GRIDS):
            positive = np.max([explored.cosines(*pin)[index] for pin in like], axis=0)
            margin = np.minimum(
                positive - threshold, positive - explored.cosines(*unlike[0])[index]
            )
            certain = np.abs(margin) > 2 * explored.error
            assert 0 < (margin[certain] > 0).mean() < 1
            veil = canvas(page, index)[..., 3].ravel() > 0
            assert ((margin < 0) == veil)[certain].all()
            name, mask = saved(page, index, "mask")
            assert name == f"{list(SIZES)[index].removesuffix('.png')}-mask.png".replace(
                *("<b>", "_b_")
            )
            assert mask.size == list(SIZES.values())[index]
            pixels = np.asarray(mask.convert("L"))
            assert set(np.unique(pixels)) <= {0, 255}
            down, right = (
                ((np.arange(count) + 0.5) / count * side).astype(int)
                for count, side in zip(grid, pixels.shape, strict=True)
            )
            assert ((pixels[down][:, right] > 0).ravel() == ~veil).all()
        click(page, *like[0])  # again: the pin goes
        assert page.locator(".marks .like").count() == 1
        press(page, "Escape")
        assert page.locator(".marks .like, .marks .unlike").count() == 0


def test_without_pins_the_mask_follows_the_mouse(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        choose(page, "mode", "mask")
        set_slider(page, "threshold", 50)
        for patch in (5, 60):
            hover(page, 0, patch)
            margin = explored.cosines(0, patch)[2] - 0.5
            certain = np.abs(margin) > explored.error
            veil = canvas(page, 2)[..., 3].ravel() > 0
            assert ((margin < 0) == veil)[certain].all()


def test_the_picture_is_saved_as_it_is_shown(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address, accept_downloads=True) as page:
        hover(page, 0, 40)
        set_slider(page, "strength", 100)
        name, picture = saved(page, 2, "picture")
        assert name == "c-similarity.png"
        assert picture.width == 1000  # five times the image's 200
        assert picture.height > 650  # the legend is below
        pixels = np.asarray(picture.convert("RGB"))[36:650:72, 36:1000:71]
        assert np.abs(pixels[0].astype(int) - canvas(page, 2)[0, :, :3]).max() <= 1
        choose(page, "mode", "mask")
        assert saved(page, 2, "picture")[0] == "c-cutout.png"


# ------------------------------------------------------------------------- attention and components
def test_maps_of_heads_and_the_mass_inside(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address, accept_downloads=True) as page:
        choose(page, "mode", "attention")
        for head in ("mean", 1):
            choose(page, "head", str(head))
            maps = [one.attention for one in explored.images]
            exact = [one.mean(dim=0) if head == "mean" else one[head] for one in maps]  # type: ignore[union-attr, index]
            high = np.quantile(np.concatenate([one.flatten().numpy() for one in exact]), 0.998)
            for index, one in enumerate(exact):
                assert_shows(canvas(page, index), one.numpy() / high, "viridis", 0.02)
                expected = mass_mask(one, 0.6).numpy()
                _, mask = saved(page, index, "mask")
                rows, columns = GRIDS[index]
                found = np.asarray(mask.convert("L").resize((columns, rows), 0)) > 0
                # Values of 16 bits may change the order of nearly equal patches.
                assert (found != expected).sum() <= 2
        assert "%" in page.locator("#high").inner_text()


def test_components_are_those_of_python(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        choose(page, "mode", "components")
        expected = components([one.features for one in explored.images])
        for index, colors in enumerate(expected):
            assert (canvas(page, index)[..., :3] == colors).all()


def test_a_convnet_offers_no_attention(browser: Any, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    explore(network("resnet10t"), [image, image], tmp_path / "page.html", size=96)
    with opened(browser, (tmp_path / "page.html").as_uri()) as page:
        assert page.get_by_role("radio").all_inner_texts() == [""] * 3
        assert not page.get_by_text("Attention").is_visible()
        assert page.locator(".note").nth(1).inner_text() == "nearest 1.00"


# ------------------------------------------------------------------------- keys, touch, and screens
def test_keys_do_what_the_mouse_does(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        page.locator("#full").check()
        surface = page.get_by_role("application", name="<b>.png, 9 rows and 9 columns of patches")
        surface.focus()
        for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "Shift+ArrowDown"):
            press(page, key)
        patch = (4 - 1 + 5) * 9 + 4 - 2
        assert_shows(canvas(page, 0), explored.cosines(1, patch)[0], "inferno", explored.error)
        press(page, "Enter")
        press(page, "ArrowRight")
        press(page, "-")
        assert page.locator(".marks .like").count() == page.locator(".marks .unlike").count() == 1
        page.get_by_role("status").get_by_text("Row 9, column 4 of <b>.png").wait_for()
        outlined = "el => getComputedStyle(el).outlineStyle"
        assert surface.evaluate(outlined) == "solid"
        hover(page, 0, 40)
        press(page, "ArrowRight")  # the marked patch moves, wherever the focus is
        assert_shows(canvas(page, 1), explored.cosines(0, 41)[1], "inferno", explored.error)
        page.get_by_role("radio", name="Similarity").focus()
        press(page, "ArrowRight")
        assert page.get_by_role("radio", name="Attention").is_checked()


def test_everything_that_can_be_used_has_a_name(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        for mode in ("similarity", "attention", "components", "mask"):
            choose(page, "mode", mode)
            tree = page.locator("body").aria_snapshot()
            for line in tree.splitlines():
                role = line.strip(" -").split(" ")[0].rstrip(":")
                if role in ("button", "radio", "slider", "checkbox", "application", "group"):
                    assert '"' in line, line
        assert 'slider "Threshold' in tree


def test_a_finger_looks_and_buttons_pin(browser: Any, explored: Explored) -> None:
    size = {"width": 390, "height": 844}
    with opened(browser, explored.address, has_touch=True, viewport=size) as page:
        page.locator("#full").check()
        page.touchscreen.tap(*point(page, 0, 40))
        draw(page)
        assert_shows(canvas(page, 1), explored.cosines(0, 40)[1], "inferno", explored.error)
        assert page.locator(".marks .like").count() == 0
        page.get_by_role("button", name="Example", exact=False).first.tap()
        page.touchscreen.tap(*point(page, 2, 60))
        page.get_by_role("button", name="Counterexample").tap()
        draw(page)
        assert page.locator(".marks .like").count() == page.locator(".marks .unlike").count() == 1


@pytest.mark.parametrize("width", [390, 768, 1440, 2560])
def test_pages_of_any_width_need_no_sideways_scrolling(
    width: int, browser: Any, explored: Explored
) -> None:
    size = {"width": width, "height": 900}
    with opened(browser, explored.address, viewport=size) as page:
        for mode in ("similarity", "attention", "components", "mask"):
            choose(page, "mode", mode)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator(".surface").nth(index).bounding_box() for index in range(3)]
        assert min(box["width"] for box in boxes) >= 150
        assert max(box["y"] + box["height"] for box in boxes) <= 900


def test_dark_and_light(browser: Any, explored: Explored) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, explored.address, color_scheme="dark") as page:
        assert page.evaluate(ground) == "rgb(20, 22, 26)"
        page.get_by_role("button", name="Use light colours").click()
        assert page.evaluate(ground) == "rgb(251, 250, 247)"
        page.get_by_role("button", name="Use dark colours").click()
        assert page.evaluate(ground) == "rgb(20, 22, 26)"


# -------------------------------------------------------------------------------------- the outside
def test_names_are_text_in_the_page(browser: Any, explored: Explored) -> None:
    with opened(browser, explored.address) as page:
        assert page.locator("figcaption .name").all_inner_texts() == list(SIZES)
        assert page.title() == "dino: a.png, <b>.png, c.png"


PLANTED: dict[str, tuple[str, str]] = {
    "a script": ("</body>", "<script>alert(1)</script></body>"),
    "a picture": ("</body>", '<img src="ADDRESS"></body>'),
    "a changed script": ('"use strict";', "fetch('ADDRESS');"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_policy_blocks_what_is_planted(
    planted: str, browser: Any, explored: Explored, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        old, new = PLANTED[planted]
        new = new.replace("ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}/x.png")
        html = Path(explored.address.removeprefix("file://")).read_text(encoding="utf-8")
        assert old in html
        (tmp_path / "page.html").write_text(html.replace(old, new), encoding="utf-8")
        page = browser.new_page()
        watch = Watch(page)
        page.goto((tmp_path / "page.html").as_uri())
        draw(page)
        page.close()
        assert any("Content Security Policy" in complaint for complaint in watch.complaints)
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()


def test_a_request_would_be_noticed(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<body data-ready><img src='http://127.0.0.1:9/x.png'></body>")
    with pytest.raises(AssertionError, match=r"127\.0\.0\.1:9"), opened(browser, page.as_uri()):
        pass


def test_a_notebook_shows_the_page_in_a_frame(browser: Any, tmp_path: Path) -> None:
    vit = network(embed_dim=24, depth=1, heads=2, patch_size=8, image_size=32)
    shown = explore(vit, Image.new("RGB", (32, 32), "red"), size=32)
    (tmp_path / "cell.html").write_text(
        f"<body data-ready>{shown._repr_html_()}</body>", encoding="utf-8"
    )
    page = browser.new_page()
    watch = Watch(page)
    page.goto((tmp_path / "cell.html").as_uri())
    page.frame_locator("iframe").locator("body[data-ready] .surface").wait_for(timeout=60_000)
    page.close()
    assert watch.complaints == []
