"""Several runs on one page: what differs, curves, results, and the same images side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reports import KNN, VIT, Reader, metrics
from PIL import Image

from dino.files import UserError
from dino.models.create import create
from dino.show.html import DARK, LIGHT, RUNS
from dino.show.report import photographs
from dino.show.report.report import report
from dino.weights.load import save


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "SIDE", 32)


@pytest.fixture
def images(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(5):
        noise = generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
    return str(tmp_path / "images")


def make(folder: Path, lines: list[dict[str, Any]], images: str | None, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "about": {"recipe": "small_data", **({"data": images} if images else {})},
        "defining": {"head.prototypes": 64, "run.batch": 64, "optim.lr": 0.001, **settings},
        "total_steps": 50,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cells(text: str, row: str) -> list[str]:
    found = re.search(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', text)
    assert found is not None, row
    return re.findall(r"<td>([^<]*)</td>", found[1])


def test_what_differs_and_what_was_measured(tmp_path: Path) -> None:
    first = make(tmp_path / "a", metrics(5), None)
    second = make(tmp_path / "b", metrics(3)[:-1], None, **{"optim.lr": 0.002, "optim.koleo": 0.1})
    (first / "results.json").write_text(json.dumps({"knn": KNN}))
    scores = {"top-1": {"trained": {"percent": 80.12, "standard_error": 1.66}, "pixels": {}}}
    result = {"evaluation": "linear", "data": "photos", "measured_images": 1234, "scores": scores}
    (second / "results").mkdir()
    (second / "results" / "linear-photos.json").write_text(json.dumps(result))
    (second / "results" / "old.json").write_text(json.dumps({"top1": 71.25, "settings": {"k": 1}}))
    out = tmp_path / "runs.html"
    assert report([first, second], out=out) == out
    text = out.read_text()
    page = Reader(text)
    assert page.headings == [
        *("2 runs compared", "Settings that differ", "Results", "How the training went")
    ]
    assert cells(text, "run") == ["a", "b"]
    assert cells(text, "steps") == ["50 of 50", "30 of 50"]
    assert cells(text, "verdict") == ["good", "healthy so far"]
    assert cells(text, "optim.lr") == ["0.001", "0.002"]
    assert cells(text, "optim.koleo") == ["not set", "0.1"]
    assert "run.batch" not in text
    assert "3 other settings are equal" in text
    error = 100 * (0.706 * 0.294 / 576) ** 0.5
    trained = "k-NN at the end, k = 20, 576 test images: the trained network"
    assert cells(text, trained) == [f"70.6 ± {error:.1f}", ""]
    assert cells(text, "linear on photos, 1,234 images: top-1, trained") == ["", "80.1 ± 1.7"]
    assert cells(text, "results/old.json: top1") == ["", "71.25"]
    assert "top-1, pixels" not in text
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)


def test_curves_lie_in_one_chart_and_keep_their_letters(tmp_path: Path) -> None:
    lines = metrics(5)
    without = [{key: line[key] for key in line if key not in ("kl", "knn")} for line in lines]
    folders = [
        make(tmp_path / "a", lines, None),
        make(tmp_path / "b", without, None),
        make(tmp_path / "c", lines[:3], None),
    ]
    text = report(folders, out=tmp_path / "runs.html").read_text()
    charts = dict(re.findall(r"<h3><span>([^<]*)</span>.*?(<svg.*?</svg>)", text))
    assert re.findall(r'polyline class="curve run(\d)"', charts["Loss"]) == ["0", "1", "2"]
    assert re.findall(r'polyline class="curve run(\d)"', charts["KL divergence"]) == ["0", "2"]
    assert re.findall(r'class="letter run\d"[^>]*>(.)<', charts["KL divergence"]) == ["A", "C"]
    assert 'aria-label="A: 0.9 at first, 0.5 at step 50; C: ' in charts["KL divergence"]
    assert "ln K = 4.159" in charts["Loss"]
    make(tmp_path / "d", lines, None, **{"head.prototypes": 128})
    other = report([tmp_path / "a", tmp_path / "d"], out=tmp_path / "runs.html").read_text()
    assert "ln K" not in other.split("<svg", 1)[1].split("</svg>")[0]
    assert other.count("healthy-band") == 1 + 2  # spread and rank: entropies depend on K


def test_the_same_images_stand_side_by_side(tmp_path: Path, images: str) -> None:
    folders = [make(tmp_path / name, metrics(5), images) for name in ("a", "b", "c")]
    for folder in folders[:2]:
        save(create(**VIT), folder / "teacher.safetensors")
    (folders[2] / "teacher.safetensors").write_bytes(b"damaged")
    text = report(folders, out=tmp_path / "runs.html").read_text()
    page = Reader(text)
    assert page.headings[-3:] == [
        *("Nearest neighbours", "Attention", "Components of the patch features")
    ]
    assert f"Pictures below are of {images}, the test images of A." in text
    assert "C have no weights that can be read" in text
    assert "the weights cannot be read" in text
    names = re.findall(r'<div class="name">([^<]*)</div>', text)
    assert names[:3] == ["query", "A: a", "B: b"]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", text.split("<h2>Attention</h2>")[1])
    assert captions[:3] == ["0.png", "A: a, mean of the heads", "B: b, mean of the heads"]
    assert len(re.findall(r'<img[^>]* alt="[^"]+"', text)) == page.tags.count("img") > 0


def test_networks_of_other_channels_are_named_and_left_out(tmp_path: Path, images: str) -> None:
    folders = [make(tmp_path / name, metrics(5), images) for name in ("a", "b")]
    save(create(**VIT), folders[0] / "teacher.safetensors")
    other = create(**VIT, channels=2)
    other.preprocessing = other.preprocessing.from_dict(
        {"mean": [0.5] * 2, "std": [0.5] * 2, "pixels": {"channels": 2}, "resize": 8, "crop": 8}
    )
    save(other, folders[1] / "teacher.safetensors")
    text = report(folders, out=tmp_path / "runs.html").read_text()
    assert "B: b take images of other channels and are left out" in text
    assert re.findall(r'<div class="name">([^<]*)</div>', text)[:2] == ["query", "A: a"]


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        (["a", "b"], {}, "a comparison of several runs needs --out"),
        (["a", "a"], {"out": "x.html"}, "a run is given twice"),
        (["a"] * (RUNS + 1), {"out": "x.html"}, f"7 runs are given: a page shows from 1 to {RUNS}"),
        (["a", "c"], {"out": "x.html"}, r"c holds no config\.json"),
    ],
)
def test_what_cannot_be_compared(
    names: list[str], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, [], None)
    with pytest.raises(UserError, match=sentence):
        report([tmp_path / name for name in names], **options)


# ------------------------------------------------------------------------------------ colours
def luminance(color: str) -> float:
    shares = np.array(list(bytes.fromhex(color))) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_curves_stand_out_from_their_card(scheme: str) -> None:
    """A contrast of 3 to 1, as WCAG 2.2 (1.4.11) demands of graphics."""
    colors = dict(re.findall(r"--(run\d|card): #(\w+)", scheme))
    card = colors.pop("card")
    card = "".join(2 * letter for letter in card) if len(card) == 3 else card
    assert len(colors) == RUNS
    for color in colors.values():
        darker, lighter = sorted((luminance(card), luminance(color)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3
