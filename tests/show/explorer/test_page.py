"""The page as one file: escaping, its policy, no addresses; the command and the function."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dino
from dino import cli
from dino.files import UserError
from dino.show.explorer.page import document
from dino.weights.load import save

# tyro hands over its MISSING in place of a string.
pytestmark = pytest.mark.usefixtures("unchecked")


class Reader(HTMLParser):
    """The tags of a document with their attributes, and the text up to the next tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int | None, str] = {}
        self.open: int | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open = len(self.tags)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.open = None

    def handle_data(self, data: str) -> None:
        self.texts[self.open] = self.texts.get(self.open, "") + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of each element with this tag."""
        found = enumerate(self.tags)
        return [(attrs, self.texts.get(i, "")) for i, (name, attrs) in found if name == tag]


HOSTILE = (
    "<img src=x onerror=alert(1)>.png",
    "a</script><script>alert(1)</script>.png",
    "<!--<script>.png",
    '" onload="alert(1).png',
    "&lt;b&gt;{title}.png",
    "\u2028'`${alert(1)}.png",
    "\udcff.png",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = dino.create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, image_size=32)
    path = tmp_path_factory.mktemp("weights") / "w<b>.safetensors"
    save(network, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


def content(name: str = "0.png") -> dict[str, Any]:
    one = {"name": name, "rows": 2, "columns": 3, "data": "", "picture": "data:,"}
    return {"error": 0.0061, "pairs": 1234, "dimensions": 2, "images": [one]}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    plain, hostile = (Reader(document(content(n), f"dino {n}")[0]) for n in ("0.png", name))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [attrs for _, attrs in hostile.tags] == [attrs for _, attrs in plain.tags]
    (_, data), (_, script) = hostile.all("script")
    assert json.loads(data)["images"][0]["name"] == name
    assert script == plain.all("script")[1][1]
    assert "<" not in data
    shown = name.encode("utf-8", "replace").decode()
    assert hostile.all("title")[0][1] == f"dino: {shown}"
    assert f"dino {shown} · 1 image" in hostile.all("p")[0][1]


def test_the_policy_allows_only_what_is_inside(weights: Path, photos: list[str]) -> None:
    html = dino.explore(weights, photos, size=32, device="cpu").html
    page = Reader(html)
    (policy,) = (a["content"] for a, _ in page.all("meta") if "http-equiv" in a)
    ((_, style),), (_, (_, script)) = page.all("style"), page.all("script")
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style", style), ("script", script))
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'"
    )
    assert not re.search(r"https?:|wss?:|//[\w.-]+\.\w|@import|url\(", html)
    named = [a for _, a in page.tags if {"src", "href", "style", "onclick"} & a.keys()]
    assert named == [{"rel": "icon", "href": "data:,"}]  # no browser asks for another icon


def test_the_command_says_what_the_page_holds(
    weights: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    words = ["--weights", str(weights), "--out", str(out), "--size", "32", "--device", "cpu"]
    cli.main(["explore", *photos, *words])
    printed = capsys.readouterr()
    summary, path = printed.out.splitlines()
    assert re.fullmatch(
        r"2 images of 4 × 5 patches, similarities differ by at most 0\.0\d\d from those in full "
        r"precision, 0\.\d MB",
        summary,
    )
    assert path == str(out)
    assert printed.err == f"next: open {out} in a browser\n"
    held = json.loads(Reader(out.read_text(encoding="utf-8")).all("script")[0][1])
    assert [image["name"] for image in held["images"]] == ["0.png", "1.png"]
    assert held["heads"] == 2
    error = re.search(r"at most ([\d.]+)", summary)
    assert error is not None
    assert 0 <= float(error[1]) - held["error"] < 0.001
    assert f"at most {error[1]} from" in out.read_text(encoding="utf-8")  # the page says it too


def test_python_returns_a_page_that_a_notebook_shows(
    weights: Path, photos: list[str], tmp_path: Path
) -> None:
    network = dino.load(weights)
    page = dino.explore(network, photos[0], tmp_path / "p.html", size=32)
    assert page.path == tmp_path / "p.html"
    assert page.path.read_text(encoding="utf-8") == page.html
    assert repr(page).startswith(f"<dino page: {tmp_path / 'p.html'}; 1 image of 4 × 5 patches")
    shown = dino.explore(network, Image.open(photos[0]), size=32)
    assert shown.path is None
    ((frame, _),) = Reader(shown._repr_html_()).all("iframe")
    assert frame["srcdoc"] == shown.html
    assert frame["sandbox"] == "allow-scripts allow-downloads"


def test_a_network_in_training_is_read_in_evaluation(photos: list[str]) -> None:
    network = dino.create("resnet10t")
    page = dino.explore(network, photos, size=64)
    assert network.training
    assert dino.explore(network.eval(), photos, size=64).html == page.html
    assert not network.training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"out": "page.txt"}, "page.txt has another ending than .html, .htm"),
        ({"out": 3}, "out must be a path, not 3"),
        ({"size": 0}, "size is 0: it must be an integer from 1 to 10,000"),
        ({"images": []}, "0 images are given"),
        ({"images": "none.jpg"}, "none.jpg does not exist"),
        ({"weights": "nowhere"}, "there are no weights at nowhere"),
        ({"device": "cpux"}, "unknown device"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    options: dict[str, Any],
    sentence: str,
    weights: Path,
    photos: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        dino.explore(**{"weights": weights, "images": photos, "device": "cpu", **options})
    assert not list(tmp_path.glob("*.html"))


def test_images_of_several_shapes_are_counted_by_the_largest() -> None:
    filled = content()
    filled["images"].append({**filled["images"][0], "rows": 5})
    assert document(filled, "dino")[1].startswith("2 images of up to 5 × 3 patches")
