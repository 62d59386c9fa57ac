"""Retrieval: the transform, the scales, the benchmark, neighbours in a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fakes import MeanColor
from helpers.results import result
from oracle.ranking import walked
from PIL import Image
from torch import Tensor

from dino.cli import main
from dino.data.images.preprocessing import Preprocessing
from dino.evaluate.retrieval import retrieval
from dino.evaluate.retrieval.ranking_metrics import rankings
from dino.evaluate.retrieval.retrieval import (
    SCALES,
    MaxSideResize,
    Retrieval,
    descriptor,
    multiscale,
    run,
)
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.weights.load import load, save

HUES = {
    "church": (200, 30, 30),
    "tower": (30, 200, 30),
    "bridge": (30, 30, 200),
    "gate": (200, 200, 30),
}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    save(vit, tmp_path / "run" / "teacher.safetensors")
    return str(tmp_path / "run")


def noise(color: tuple[int, int, int], seed: int, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = np.array(color) + generator.integers(-30, 31, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Three photographs of each object in the database, of different sizes, and one query each."""
    root = tmp_path / "colors"
    names, queries, gnd = [], [], []
    for number, (name, color) in enumerate(HUES.items()):
        for view in range(3):
            picture = noise(color, 10 * number + view, (20 + view, 16 + 2 * number))
            (root / "database").mkdir(parents=True, exist_ok=True)
            picture.save(root / "database" / f"{name}_{view}.png")
            names.append(f"{name}_{view}")
        (root / "queries").mkdir(exist_ok=True)
        query = Image.new("RGB", (40, 30), (0, 0, 0))
        query.paste(noise(color, 100 + number, (20, 20)), (10, 5))
        query.save(root / "queries" / f"{name}.png")
        queries.append(name)
        base = 3 * number
        gnd.append({"easy": [base], "hard": [base + 1], "junk": [base + 2], "bbx": [10, 5, 30, 25]})
    gnd[3]["easy"] = []
    content = {"imlist": names, "qimlist": queries, "gnd": gnd}
    (root / "gnd.json").write_text(json.dumps(content))
    return root


# ------------------------------------------------------------------------------- the transform
@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (16, 32)), ((50, 100), (32, 16)), ((20, 10), (10, 20)), ((300, 10), (4, 32))],
)
def test_the_longer_side_is_shrunk_never_enlarged(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    result = MaxSideResize(32, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(image)
    assert tuple(result.shape) == (3, *expected)
    assert image.size == size
    torch.testing.assert_close(result[:, 0, 0], torch.tensor([2.0, -2.0, -2.0]))


def test_the_transform_is_that_of_the_published_code() -> None:
    from torchvision.transforms import functional as TF

    image = noise((90, 120, 200), 0, (75, 50))
    small = image.copy()
    small.thumbnail((32, 32), Image.Resampling.LANCZOS)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = TF.normalize(TF.to_tensor(small), list(mean), list(std))
    torch.testing.assert_close(MaxSideResize(32, 4, mean, std)(image), theirs)


def test_the_smallest_scale_of_a_thin_image_holds_a_patch(weights: str) -> None:
    backbone = load(weights)
    what = descriptor(backbone, 32, "multi")
    image = what.transform(Image.new("RGB", (300, 10)))
    assert tuple(image.shape) == (3, 8, 32)
    assert what.compute(backbone, image[None]).shape == (1, 12)


# ---------------------------------------------------------------------------------- the scales
@pytest.mark.parametrize("batch", [1, 3])
def test_several_scales_are_averaged_image_by_image(batch: int) -> None:
    torch.manual_seed(0)
    network = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8).eval()
    images = torch.randn(batch, 3, 24, 16)
    ours = multiscale(network, images, SCALES["multi"])
    for image, row in zip(images, ours, strict=True):
        scaled = [image[None]]
        for factor in (2**-0.5, 0.5):
            options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
            scaled.append(F.interpolate(image[None], scale_factor=factor, **options))
        total = sum((network(one) for one in scaled), start=torch.zeros(1, 12)) / 3
        torch.testing.assert_close(row, (total / total.norm())[0])
    torch.testing.assert_close(multiscale(network, images, (1.0,)), network(images))


def test_convnets_are_described_by_their_pooled_feature() -> None:
    network = create("resnet50").eval()
    what = descriptor(network, 64, "multi")
    image = what.transform(noise((9, 99, 199), 0, (90, 60)))
    with torch.inference_mode():
        row = what.compute(network, image[None])
    assert row.shape == (1, 2048)
    assert row.norm().item() == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------- the benchmark
def expected(backbone: Backbone, root: Path, boxed: bool) -> dict[str, list[float]]:
    """mAP and mP@k in percent by the oracle, from features computed one image at a time."""
    content = json.loads((root / "gnd.json").read_text())
    preprocessing: Preprocessing = backbone.preprocessing
    transform = MaxSideResize(32, 4, preprocessing.mean, preprocessing.std)

    def feature(path: Path, box: list[int] | None = None) -> Tensor:
        image = Image.open(path)
        image = image if box is None else image.crop(tuple(box))
        with torch.inference_mode():
            return F.normalize(backbone(transform(image)[None]), dim=1)[0]

    rows = torch.stack([feature(root / "database" / f"{n}.png") for n in content["imlist"]])
    result: dict[str, list[float]] = {}
    for protocol, right, left_out in (
        ("easy", ["easy"], ["hard", "junk"]),
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["easy", "junk"]),
    ):
        scores = []
        for name, judged in zip(content["qimlist"], content["gnd"], strict=True):
            box = judged["bbx"] if boxed else None
            order = (rows @ feature(root / "queries" / f"{name}.png", box)).argsort(descending=True)
            positives = {i for kind in right for i in judged[kind]}
            junk = {i for kind in left_out for i in judged[kind]}
            if walk := walked(order.tolist(), positives, junk, [1, 5, 10]):
                scores.append([walk[0], *walk[1]])
        result[protocol] = (100 * np.array(scores).mean(axis=0)).tolist()
    return result


@pytest.mark.parametrize("query", ["whole", "box"])
def test_the_command_equals_the_oracle(
    query: Any, weights: str, benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Retrieval(
        weights=weights,
        benchmark=str(benchmark),
        query=query,
        size=32,
        workers=0,
        device="cpu",
        baseline=True,
    )
    found = run(settings)
    assert found.keys() == {"trained", "untrained"}
    for protocol, numbers in expected(load(weights), benchmark, query == "box").items():
        ours = found["trained"][protocol]
        assert [ours["map"], *ours["mp"].values()] == pytest.approx(numbers, rel=1e-5)
        assert ours["queries"] == (3 if protocol == "easy" else 4)
    printed = capsys.readouterr().out
    for word in ("colors", f"4 queries ({query})", "12 images", "32 px", "medium, untrained"):
        assert word in printed
    written = result(weights, "retrieval")
    assert written["retrieval"] == found
    for name, by_protocol in found.items():
        assert written["scores"]["mAP, hard"][name] == {"percent": by_protocol["hard"]["map"]}
    assert written["measured_images"] == 4
    assert written["scales"] == [1.0]
    assert written["settings"]["query"] == query
    assert written["weights"]["architecture"]["arch"] == "vit_tiny"


def test_boxes_and_full_queries_are_cached_separately(weights: str, benchmark: Path) -> None:
    """Both are features of the same files, in the same store."""
    how: dict[str, Any] = {"benchmark": str(benchmark), "size": 32, "workers": 0, "device": "cpu"}
    aps = [
        run(Retrieval(weights=weights, query=query, **how))["trained"]["medium"]["ap"]
        for query in ("whole", "box", "whole")
    ]
    assert aps[0] == aps[2] != aps[1]


def test_defaults_are_the_published_ones() -> None:
    settings = Retrieval(weights="w")
    assert settings.query == "whole"
    assert settings.input_size("roxford5k") == (224, "single")
    assert settings.input_size("rparis6k") == (512, "multi")
    assert SCALES["multi"] == pytest.approx((1, 0.5**0.5, 0.5))
    assert Retrieval(weights="w", size=96, scales="single").input_size("rparis6k") == (96, "single")


def test_one_image_and_one_query_are_enough(weights: str, tmp_path: Path) -> None:
    for folder in ("database", "queries"):
        (tmp_path / folder).mkdir()
    noise((1, 99, 9), 0, (20, 20)).save(tmp_path / "database" / "a.png")
    noise((1, 99, 9), 1, (20, 20)).save(tmp_path / "queries" / "q.png")
    gnd = {"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [0], "hard": [], "junk": []}]}
    (tmp_path / "gnd.json").write_text(json.dumps(gnd))
    found = run(Retrieval(weights=weights, benchmark=str(tmp_path), workers=0, device="cpu"))
    assert found["trained"]["easy"]["map"] == found["trained"]["medium"]["map"] == 100.0
    assert found["trained"]["hard"]["queries"] == 0
    written = result(weights, "retrieval")
    assert written["retrieval"]["trained"]["hard"]["map"] is None


def test_every_image_of_a_ground_truth_is_needed(weights: str, benchmark: Path) -> None:
    (benchmark / "database" / "tower_1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"colors needs every .*tower_1\.png cannot be read"):
        run(Retrieval(weights=weights, benchmark=str(benchmark), workers=0, device="cpu"))


def test_features_that_are_not_finite_are_refused(benchmark: Path, tmp_path: Path) -> None:
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    with torch.no_grad():
        vit.cls_token.fill_(torch.nan)  # type: ignore[operator, union-attr]
    save(vit, tmp_path / "bad.safetensors")
    bad = str(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="NaN or infinity"):
        run(Retrieval(weights=bad, benchmark=str(benchmark), workers=0, device="cpu"))


# ------------------------------------------------------------------------- without ground truth
def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_neighbours_of_a_folder(
    weights: str, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "mine.json"
    settings = Retrieval(
        weights=weights,
        data=str(benchmark / "database"),
        queries=str(benchmark / "queries"),
        k=5,
        workers=0,
        device="cpu",
        out=out,
    )
    files = run(settings)
    assert "5 neighbours of 4 queries among 12 images" in capsys.readouterr().out
    assert files == {"csv": out.with_suffix(".csv"), "sheet": out.with_suffix(".png")}
    rows = read(files["csv"])
    assert len(rows) == 4 * 5
    assert [row["rank"] for row in rows[:5]] == ["1", "2", "3", "4", "5"]
    queries = sorted((benchmark / "queries").iterdir())
    database = sorted((benchmark / "database").iterdir())
    backbone = load(weights)
    what = descriptor(backbone, 224)
    with torch.inference_mode():
        features, bank = (
            torch.cat([backbone(what.transform(Image.open(path))[None]) for path in paths])
            for paths in (queries, database)
        )
    best = [row[:5].tolist() for row in rankings(features, bank)]
    assert [row["path"] for row in rows] == [str(database[i]) for row in best for i in row]
    assert [row["query"] for row in rows] == [str(query) for query in queries for _ in range(5)]
    cosine = F.cosine_similarity(features[0], bank[best[0][0]], dim=0).item()
    assert float(rows[0]["similarity"]) == pytest.approx(cosine, abs=1e-5)
    with Image.open(files["sheet"]) as sheet:
        assert sheet.width > 5 * 144
        assert sheet.height > 4 * 144
    assert json.loads(out.read_text())["neighbours"] == {"queries": 4, "database": 12, "k": 5}


def test_without_queries_each_image_is_looked_up_in_the_others(
    weights: str, color_folder: Callable[..., Path]
) -> None:
    folder = color_folder("photos", 2)
    (folder / "broken.png").write_bytes(b"damaged")
    files = run(Retrieval(weights=weights, data=str(folder), workers=0, device="cpu"))
    rows = read(files["csv"])
    assert files["csv"] == Path(weights) / "results" / "neighbours-photos.csv"
    assert len(rows) == 6 * 5  # fewer than the default of ten: there are no more
    assert all(row["query"] != row["path"] for row in rows)


def test_right_and_wrong_neighbours_are_marked_by_class(
    weights: str, color_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets = []
    monkeypatch.setattr(retrieval, "save_sheet", lambda *sheet: sheets.append(sheet))
    folder, queries = color_folder("photos", 2), color_folder("queries", 1)
    plain = queries / "red"  # one folder: no classes
    for looked_up in (None, queries, plain):
        named = None if looked_up is None else str(looked_up)
        run(Retrieval(weights=weights, data=str(folder), queries=named, workers=0, device="cpu"))
    (_, rows, title), (_, _, other), (_, unlabelled, bare) = sheets
    assert "Nearest neighbours of 6 of 6 queries" in title
    assert "Nearest neighbours of 3 of 3 queries" in other
    assert "Solid green frame: the query's class" in title
    assert "frame" not in bare
    assert {cell.frame for cell in unlabelled[0][1:]} == {None}
    for row in rows:
        query, *cells = row
        assert query.frame == "plain"
        own = query.caption.split()[-1]
        for cell in cells:
            assert cell.frame == ("right" if cell.caption.split()[-1] == own else "wrong")
        assert [cell.frame for cell in cells].count("right") == 1


def test_a_single_image_has_no_neighbours(weights: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    noise((1, 2, 3), 0, (20, 20)).save(tmp_path / "one" / "a.png")
    with pytest.raises(UserError, match="a single image"):
        run(Retrieval(weights=weights, data=str(tmp_path / "one"), workers=0, device="cpu"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --benchmark"),
        ({"benchmark": "a", "data": "b"}, "either --benchmark"),
        ({"benchmark": "a", "queries": "b"}, "omit --queries"),
        ({"benchmark": "nowhere"}, "nowhere is no folder"),
        ({"data": "b", "baseline": True}, "--baseline.* need --benchmark"),
        ({"data": "b", "query": "box"}, "--query box need --benchmark"),
        ({"data": "b", "k": 0}, "k is 0: it must be an integer of at least 1"),
        ({"data": "b"}, "b does not exist"),
        ({"data": "..", "k": 3}, "give it as --benchmark"),
        ({"data": ".", "size": 0}, "size is 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    options: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    benchmark: Path,
    weights: str,
) -> None:
    monkeypatch.chdir(benchmark / "queries")
    with pytest.raises(UserError, match=words):
        run(Retrieval(weights=weights, device="cpu", **options))


def test_the_command_line(weights: str, benchmark: Path) -> None:
    how = ["--weights", weights, "--benchmark", str(benchmark), "--workers", "0", "--device", "cpu"]
    main(["evaluate", "retrieval", *how, "--scales", "multi", "--size", "32"])
    written = result(weights, "retrieval")
    assert written["scales"] == pytest.approx([1, 0.5**0.5, 0.5])


def test_any_backbone_without_patches_will_do(mean_color: MeanColor) -> None:
    what = descriptor(mean_color.eval(), 16)
    image = what.transform(Image.new("RGB", (40, 20), (255, 255, 255)))
    assert what.compute(mean_color, image[None]).shape == (1, 3)
