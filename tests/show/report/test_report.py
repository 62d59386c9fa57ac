"""The page of a run: its sections, its warnings, and that it is self-contained."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reports import KNN, VIT, Reader, metrics
from PIL import Image

from dino.data.images.image_errors import write_list
from dino.data.sources.base import Source
from dino.files import UserError
from dino.models.create import create
from dino.show.html import picture
from dino.show.report import neighbours, photographs, similarity
from dino.show.report.report import report
from dino.show.report.run_contents import Run
from dino.show.report.skipped import LISTED
from dino.show.report.views import IMAGES
from dino.weights.load import save

MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs of 16 patches a side instead of 60: attention costs the fourth power."""
    monkeypatch.setattr(photographs, "SIDE", 64)
    monkeypatch.setattr(similarity, "SIDE", 64)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        *,
        data: str | None = None,
        val: str | None = None,
        lines: list[dict[str, Any]] | None = None,
        knn: dict[str, Any] | None = None,
        arch: str | None = None,
        **options: Any,
    ) -> Path:
        run = tmp_path / "runs" / "a & b"
        run.mkdir(parents=True)
        config = {
            "about": {"recipe": "small_data", **({"data": data, "val": val} if data else {})},
            "defining": {"head.prototypes": 64, "data.images": 1234, "run.seed": 0},
            "total_steps": 50,
        }
        (run / "config.json").write_text(json.dumps(config))
        text = "".join(json.dumps(line) + "\n" for line in lines or [])
        (run / "metrics.jsonl").write_text(text + '{"step": 60, "lo')  # still being written
        if knn:
            (run / "results.json").write_text(json.dumps({"knn": knn}))
        if arch:
            save(create(arch, **options), run / "teacher.safetensors")
        return run

    return make


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[str, bool], Path]:
    """A folder of noisy pictures of different sizes, with or without classes."""

    def make(name: str, classes: bool) -> Path:
        generator = torch.Generator().manual_seed(len(name))
        for index in range(8):
            folder = tmp_path / name / (f"class {index % 2}" if classes else "")
            folder.mkdir(parents=True, exist_ok=True)
            shape = (20 + index, 31 - index, 3)
            noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
        return tmp_path / name

    return make


VERDICT = "Verdict: healthy"
PICTURES = [
    "Nearest neighbours",
    "Attention",
    "Components of the patch features",
    "Similar patches",
]


def read(run: Path) -> tuple[str, Reader]:
    path = report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Reader(text)


def test_a_complete_page(make_run: MakeRun, photos: Callable[[str, bool], Path]) -> None:
    data, val = photos("train", True), photos("val", True)
    text, page = read(make_run(data=str(data), val=str(val), lines=metrics(5), knn=KNN, **VIT))
    assert page.headings == [
        "a & b",
        "Verdict: good",
        "k-NN accuracy of the features",
        "How the training went",
        *PICTURES,
    ]
    for words in (
        "70.6 %",
        "58.6 %",
        "37.0 %",
        "+12.0 points against the untrained network",
        "+33.6 points against raw pixels",
        "20 most similar of 1,728",
        "1,234 images",
        "recipe small_data",
        "ln K = 4.159",
        "25 % of the time",
        "images that were not trained on",
        "each of the 2 heads",
        "50 steps",
    ):
        assert words in text
    assert page.tags.count("svg") == 8
    assert text.count('class="same"') + text.count('class="apart"') == 2 * 6 * neighbours.NEIGHBOURS


def test_a_page_is_self_contained(make_run: MakeRun, photos: Callable[[str, bool], Path]) -> None:
    run = make_run(data=str(photos("train", False)), lines=metrics(5), knn=KNN, **VIT)
    text, page = read(run)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert {"script", "link", "object"}.isdisjoint(page.tags)
    assert "default-src 'none'" in text


def test_every_image_has_an_alternative_text(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    text, page = read(make_run(data=str(photos("train", True)), lines=metrics(5), **VIT))
    assert len(re.findall(r'<img[^>]* alt="[^"]+"', text)) == page.tags.count("img") > 0
    assert len(re.findall(r'<svg[^>]* aria-label="[^"]+"', text)) == page.tags.count("svg")


def test_without_classes_neighbours_have_no_frames(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    text, page = read(make_run(data=str(photos("train", False)), **VIT))
    assert page.headings == ["a & b", *PICTURES]
    assert 'class="same"' not in text
    assert 'class="apart"' not in text
    assert "frame" not in text[text.index("Nearest neighbours") :].split("</p>")[0]


def test_leave_one_out_is_named(make_run: MakeRun) -> None:
    knn = {**KNN, "bank": 100, "queries": 100, "leave_one_out": True}
    text, _ = read(make_run(knn=knn))
    assert "Each of 100 images is given the class that the 20 most similar of 99 others" in text


def test_no_query_is_its_own_neighbour(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    text, _ = read(make_run(data=str(photos("train", False)), **VIT))
    for block in text.split('<div class="query">')[1:]:
        query, *others = re.findall(r'src="([^"]+)"', block.split("<h2>")[0])
        assert query not in others
        assert len(others) == 2 * neighbours.NEIGHBOURS


def test_photographs_of_neighbours_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 images, one or two are decoded at a time; thumbnails and inputs remain."""
    alive, most = 0, 0

    class Photographs(Source):
        def __len__(self) -> int:
            return 40

        def path(self, index: int) -> str:
            return f"{index}.png"

        def __getitem__(self, index: int) -> Image.Image:
            nonlocal alive, most
            image = Image.new("RGB", (400, 300), (index, 0, 255 - index))
            alive, most = alive + 1, max(most, alive + 1)
            weakref.finalize(image, gone)
            return image

    def gone() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(neighbours, "open_source", lambda *_: Photographs())
    networks = [
        create("vit_tiny", embed_dim=24, depth=1, heads=2, patch_size=16, image_size=32)
    ] * 2
    named = dict(zip(("trained", "untrained"), networks, strict=True))
    text = neighbours.neighbours(named, "images", None)
    assert text.count("<img") == neighbours.QUERIES * (1 + 2 * neighbours.NEIGHBOURS)
    assert most <= 2
    assert alive == 0


def test_convnets_have_components_but_no_attention(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    run = make_run(data=str(photos("train", False)), arch="resnet50", image_size=32)
    _, page = read(run)
    assert page.headings == ["a & b", PICTURES[0], *PICTURES[2:]]


def test_a_run_that_has_just_begun(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(5)[:2])
    text, page = read(run)
    assert page.headings == ["a & b", "Verdict: healthy so far", "How the training went"]
    assert "20 of 50 steps" in text
    (run / "metrics.jsonl").unlink()
    _, page = read(run)
    assert page.headings == ["a & b"]


def test_missing_images_affect_only_their_sections(make_run: MakeRun) -> None:
    text, page = read(make_run(data="/nowhere/at/all", lines=metrics(5), **VIT))
    assert page.headings == ["a & b", VERDICT, "How the training went", "Images"]
    assert "/nowhere/at/all does not exist" in text


def test_collapse_and_refused_steps_stand_at_the_top(make_run: MakeRun) -> None:
    lines = [*metrics(5), {"step": 50, "collapse": "uniform"}, {"step": 50, "refused": 3}]
    text, _ = read(make_run(lines=lines))
    top = text[: text.index("How the training went")]
    assert "At step 50 the run collapsed: uniform" in top
    assert "3 steps were refused" in top


def test_measures_that_were_not_finite_are_left_out(make_run: MakeRun) -> None:
    lines = [*metrics(5), {"step": 55, "loss": None}, {"step": 56, "loss": float("nan")}]
    run = make_run(lines=lines)
    curve = Run(run).curve("loss")
    assert curve is not None
    assert curve.steps == (10, 20, 30, 40, 50)
    report(run)


def test_names_cannot_break_the_page(make_run: MakeRun) -> None:
    hostile = "<script>alert(1)</script>"
    run = make_run(data=hostile, lines=metrics(2), **VIT)
    text, page = read(run)
    assert "<title>dino: a &amp; b</title>" in text
    assert hostile not in text
    assert "script" not in page.tags


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        report(tmp_path)


def test_pictures_come_back_from_the_page() -> None:
    image = Image.new("RGB", (30, 20), (10, 200, 90))
    for html, size in (
        (picture(image, "p", exact=True), (30, 20)),
        (picture(image, "p", width=15), (15, 10)),
    ):
        data = re.search(r"base64,([^\"]+)", html)
        assert data is not None
        back = Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB")
        assert back.size == size
        red, green, blue = back.getpixel((3, 3))  # type: ignore[misc]
        assert max(abs(red - 10), abs(green - 200), abs(blue - 90)) <= 3


def test_a_run_from_weights_is_compared_with_its_start(make_run: MakeRun) -> None:
    lines = [
        {"step": 0, "knn": {"k20": 70.0}},
        *metrics(5),
        {"step": 30, "below_start": 2.5},
        {"step": 50, "below_start": 7.5},
    ]
    text = report(make_run(lines=lines)).read_text()
    Reader(text)
    assert "start 70" in text
    assert "At step 50 k-NN was 7.5 points below the weights" in text
    assert "2.5 points" not in text


ODD_LINES = [
    "not JSON",
    "[1, 2]",
    "7",
    '{"loss": 3.0}',
    '{"step": "ten", "loss": 3.0}',
    '{"step": NaN, "loss": 3.0}',
    "[" * 100_000,
]


def test_odd_lines_of_metrics_are_counted_and_ignored(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(5))
    odd = [
        '{"step": 15, "loss": [], "knn": 3, "refused": "many", "lr": true, "below_start": "far"}'
    ]
    odd += ['{"step": 16, "knn": {"best": 3.0, "k20": "high"}}', *ODD_LINES]
    with (run / "metrics.jsonl").open("w") as file:
        file.write("".join(f"{line}\n" for line in odd))
        file.writelines(json.dumps(line) + "\n" for line in metrics(5))
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"\xff\xfe\n")
    text, page = read(run)
    assert f"{len(ODD_LINES) + 1} lines of metrics.jsonl are no metrics" in text
    assert page.tags.count("svg") == 8


@pytest.mark.parametrize("content", ["{}", '{"about": 3, "defining": [], "total_steps": "all"}'])
def test_missing_keys_of_a_run_are_missing_on_the_page(make_run: MakeRun, content: str) -> None:
    run = make_run(lines=metrics(5))
    (run / "config.json").write_text(content)
    (run / "results.json").write_text('{"knn": {"trained": "high", "pixels": null}}')
    _, page = read(run)
    assert page.headings == ["a & b", f"{VERDICT} so far", "How the training went"]


@pytest.mark.parametrize("name", ["results.json", "teacher.safetensors"])
def test_damaged_files_become_a_sentence(make_run: MakeRun, name: str) -> None:
    run = make_run(lines=metrics(5))
    (run / name).write_bytes(b"damaged")
    text, page = read(run)
    assert page.headings == ["a & b", VERDICT, "How the training went"]
    assert name in text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json"])
def test_folders_and_pipes_in_place_of_files_become_a_sentence(
    make_run: MakeRun, name: str, make: Callable[[Path], None]
) -> None:
    run = make_run(knn=KNN)
    (run / name).unlink()
    make(run / name)
    text, _ = read(run)
    assert f"{name} is no regular file" in text


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_the_configuration_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    with pytest.raises(UserError, match=r"config\.json is no regular file"):
        report(run)


def test_features_that_are_not_finite_become_a_sentence(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    run = make_run(data=str(photos("train", False)))
    vit = create(**VIT)
    next(vit.parameters()).data.fill_(float("nan"))
    save(vit, run / "teacher.safetensors")
    text, page = read(run)
    assert page.headings == ["a & b", *PICTURES]
    assert text.count("the network has diverged") == len(PICTURES)


def test_names_beyond_utf8_and_unknown_back_ends_are_harmless(
    make_run: MakeRun, photos: Callable[[str, bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    folder = photos("train", False)
    os.rename(folder / "0.png", os.fsencode(folder) + b"/\xff0.png")  # noqa: PTH104
    run = make_run(data=str(folder), **VIT)
    _, page = read(run)
    assert page.headings == ["a & b", *PICTURES]


# -------------------------------------------------------------------------- origin and results
SESSIONS = [
    {
        "started": "2026-01-02T03:04:05+01:00",
        "saved": "2026-01-02T04:04:05+01:00",
        "seconds": 3600,
        "command": "dino pretrain small_data --out 'a & b'",
        "machine": "one: cpu",
        "versions": {"dino-ssl": "0.1.0", "torch": "2.9.0"},
        "changed": {},
    },
    {
        "started": "2026-01-03T03:04:05+01:00",
        "saved": "2026-01-03T04:34:05+01:00",
        "seconds": 5400.4,
        "command": "dino pretrain small_data --out 'a & b'",
        "machine": "two: NVIDIA H100",
        "versions": {"dino-ssl": "0.2.0", "torch": "2.9.0"},
        "changed": {"optim.lr": [0.0005, 0.002], "run.batch": [256, 64]},
    },
]


def test_the_origin_of_a_run(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(5))
    (run / "sessions.json").write_text(json.dumps(SESSIONS))
    text, page = read(run)
    assert page.headings[-1] == "This run"
    for words in (
        "2026-01-02 03:04 UTC+01:00",
        "<td>finished</td><td>2026-01-03 04:34",
        "2:30:00, 2 sessions",
        "<td>dino pretrain small_data --out &#x27;a &amp; b&#x27;</td>",
        "one: cpu\ntwo: NVIDIA H100",
        "dino-ssl 0.2.0, torch 2.9.0",
        "against recipe small_data",
        "optim.lr = 0.002 (recipe: 0.0005)\nrun.batch = 64 (recipe: 256)",
    ):
        assert words in text
    assert "time left" not in text


def test_the_time_that_is_left(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(3)[:-1])  # 20 steps of 100 images at 250 images/s are left
    config = json.loads((run / "config.json").read_text())
    config["defining"]["run.batch"] = 100
    (run / "config.json").write_text(json.dumps(config))
    (run / "sessions.json").write_text(json.dumps(SESSIONS[:1]))
    text, _ = read(run)
    assert "about 0:00:08" in text
    assert "<td>newest checkpoint</td><td>2026-01-02 04:04" in text
    assert "(recipe small_data)" not in text


@pytest.mark.parametrize(
    "content", ["[]", "7", "[7]", "{}", '[{"seconds": "many", "changed": {"a": 1}}]']
)
def test_odd_sessions_are_harmless(make_run: MakeRun, content: str) -> None:
    run = make_run(lines=metrics(5))
    (run / "sessions.json").write_text(content)
    text, _ = read(run)
    assert "left out" not in text


def test_later_evaluations_are_shown(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(5))
    knn = {"knn": {"trained": {"k10": {"top1": 61.25}}}, "bank": 9000, "versions": {"torch": 2}}
    (run / "results").mkdir()
    (run / "results" / "knn-photos.json").write_text(json.dumps(knn))
    scores = {
        "mAP, easy": {
            "trained": {"percent": 61.257, "standard_error": 1.234},
            "pixels": {"percent": None},
        },
        "mAP, hard": {"trained": {"percent": 7.5}},
    }
    about = {"evaluation": "retrieval", "data": "towers", "measured_images": 1234}
    written = {"written": "2031-01-02T03:04:05+00:00", "scores": scores, "other": 0.125}
    (run / "results" / "retrieval-towers.json").write_text(json.dumps({**about, **written}))
    (run / "results" / "odd.json").write_text('{"scores": [1], "sizes": {"odd": 8}}')
    (run / "results" / "list.json").write_text("[1, 2]")
    (run / "results" / "many.json").write_text(json.dumps({str(n): n + 0.5 for n in range(90)}))
    (run / "linear.json").write_text(json.dumps({"linear": {"top1": 70}, "settings": {"lr": 1}}))
    (run / "mine.json").write_text('{"answer": 123.25}')
    text, page = read(run)
    assert "Evaluations" in page.headings
    for words in (
        "results/knn-photos.json",
        "<td>knn trained k10 top1</td><td>61.25</td>",
        "<td>bank</td><td>9,000</td>",
        "<td>linear top1</td><td>70</td>",
        "30 more numbers are in the file",
        "<td>sizes odd</td><td>8</td>",
        "retrieval on towers",
        "1,234 images, results/retrieval-towers.json, written 2031-01-02 03:04 UTC.",
        "<th>%</th><th>trained</th><th>pixels</th>",
        "<td>mAP, easy</td><td>61.3 ± 1.2</td><td></td>",
        "<td>mAP, hard</td><td>7.5</td><td></td>",
    ):
        assert words in text
    assert "0.125" not in text  # scores stand for all numbers
    assert "versions torch" not in text
    assert "mine.json" not in text  # no result of ours


def test_a_page_without_images_loads_itself_again(
    make_run: MakeRun, photos: Callable[[str, bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(data=str(photos("train", True)), lines=metrics(3), **VIT)
    monkeypatch.delattr("dino.show.report.report.load")  # neither the weights nor the data are read
    monkeypatch.delattr("dino.show.report.report.photographs")
    text = report(run, images=False, refresh=60).read_text()
    assert Reader(text).headings == ["a & b", "Verdict: healthy so far", "How the training went"]
    assert '<meta http-equiv="refresh" content="60">' in text
    assert "dino report RUN" in text
    monkeypatch.undo()
    text, page = read(run)
    assert page.headings[-4:] == PICTURES
    assert 'http-equiv="refresh' not in text


def test_pictures_have_the_names_of_their_files(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    folder = photos("train", True)
    text, _ = read(make_run(data=str(folder), **VIT))
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", text)
    query, *others = captions[: 1 + 2 * neighbours.NEIGHBOURS]
    assert re.fullmatch(r"class [01]/[0-7]\.png", query)
    assert all(re.fullmatch(r"-?\d\.\d\d class [01]/[0-7]\.png", name) for name in others)
    assert str(folder) not in "".join(captions)


# ------------------------------------------------------------------ curves, views, skipped images
def test_advice_stands_below_the_curve_of_a_measure(make_run: MakeRun) -> None:
    lines = [{**line, "teacher_entropy": math.log(64)} for line in metrics(5)[:-1]]
    text, _ = read(make_run(lines=lines))
    curves = text[text.index("How the training went") :]
    advice = re.findall(r'<p class="advice">([^<]*)</p>', curves)
    assert len(advice) == 1
    assert advice[0].startswith("Failed: the targets are almost uniform")
    assert "Try a lower teacher temperature" in advice[0]
    assert advice[0] in curves.split("<h3><span>Teacher entropy</span>")[1].split("</figure>")[0]
    assert "healthy values" in curves
    assert curves.count("healthy-band") == 4


def test_the_views_are_those_of_the_run(
    make_run: MakeRun, photos: Callable[[str, bool], Path]
) -> None:
    folder = photos("train", True)
    run = make_run(data=str(folder), **VIT)
    config = json.loads((run / "config.json").read_text())
    views = {"global_size": 24, "local_count": 3, "local_size": 8, "jitter": 0.0, "flip": 1.0}
    config["defining"] |= {f"views.{name}": value for name, value in views.items()}
    (run / "config.json").write_text(json.dumps(config))
    text, page = read(run)
    assert page.headings[-1] == "Views"
    section = text[text.index("<h2>Views</h2>") :]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", section)
    assert len(captions) == IMAGES * (1 + 2 + 3)
    assert re.fullmatch(r"\d\.png, \d+ x \d+ px", captions[0])
    assert captions[1].startswith("1 global1, 24 px: mirrored")
    assert captions[5].startswith("5 local, 8 px: mirrored")
    config["defining"]["views.local_count"] = "many"
    (run / "config.json").write_text(json.dumps(config))
    text, page = read(run)
    assert page.headings[-1] == "Views"
    assert "config.json is damaged (local_count is &#x27;many&#x27;" in text


def test_images_that_were_skipped_are_listed(make_run: MakeRun) -> None:
    run = make_run(lines=metrics(5))
    found = {f"{n}<b>.jpg": ("damaged", "it ends early") for n in range(LISTED + 5)}
    write_list(run / "skipped.csv", {**found, "x.jpg": ("missing", "no such file")})
    text, page = read(run)
    assert "Images that could not be used" in page.headings
    assert f"{LISTED + 5} damaged, 1 missing, the first {LISTED} of them; all in skipped" in text
    assert text.count("<td>it ends early</td>") == LISTED
    assert "<b>.jpg" not in text
    (run / "skipped.csv").write_text("no,list\n1,2\n")
    text, _ = read(run)
    assert "skipped.csv is damaged" in text


def test_the_page_inside_is_kept_small(
    photos: Callable[[str, bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = create(**VIT)
    shown, _ = photographs.photographs(str(photos("train", False)), None)
    whole = similarity.similarity(network, shown)
    monkeypatch.setattr(similarity, "LARGEST", len(whole.section) - 5000)
    small = similarity.similarity(network, shown)
    assert len(small.section) < len(whole.section) - 5000
    assert small.scripts == whole.scripts != ()
    assert "rows&quot;:16," in whole.section
    assert "rows&quot;:16," not in small.section
