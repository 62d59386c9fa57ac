"""Images of other channels than RGB, from the measurement to the page of the run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from helpers.results import result as written

import dino
from dino import cli
from dino.data.commands.stats import Stats, read_stats
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.features.raw_pixels import raw_pixels
from dino.files import UserError
from dino.pretraining import measured
from dino.train.recipes import demo

pytestmark = pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING for a string

CHANNELS = 5
TINY: dict[str, Any] = {
    "model.embed_dim": 24,
    "model.depth": 1,
    "model.heads": 2,
    "model.patch_size": 8,
    "head.prototypes": 16,
    "head.hidden": 16,
    "head.bottleneck": 8,
    "views.global_size": 16,
    "views.local_size": 8,
    "views.local_count": 1,
    "run.batch": 4,
    "run.duration": "2 steps",
    "optim.warmup": "1 steps",
    "execution.workers": 0,
}
FLAGS = [w for k, v in TINY.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def tile(number: int) -> np.ndarray:
    """[C, H, W] of 16 bits, each channel with a range of its own."""
    random = np.random.default_rng(number)
    scale = np.array([100, 900, 3000, 12_000, 60_000])[:, None, None]
    return (random.gamma(2, 0.1, (CHANNELS, 24, 31)) * scale).clip(0, 65535).astype(np.uint16)


def write(path: Path, values: np.ndarray, kind: str) -> None:
    if kind == "npy":
        np.save(path.with_suffix(".npy"), values.transpose(1, 2, 0))
    elif kind == "pages":
        axes = {"axes": "CYX"}
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", metadata=axes)
    else:
        tifffile.imwrite(
            path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="separate"
        )


def tiles(root: Path, kind: str) -> Path:
    for number in range(12):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{number:02}", tile(number), kind)
    return root


@pytest.mark.parametrize("kind", ["npy", "pages", "samples"])
def test_from_measuring_to_features(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, stats, run = tiles(tmp_path / "data", kind), tmp_path / "s.json", tmp_path / "run"
    cli.main(["data", "stats", str(data), "--channels", "5", "--out", str(stats), "--workers", "0"])
    words = ["--data", str(data), "--out", str(run), "--stats", str(stats), "--device", "cpu"]
    cli.main(["pretrain", "demo", *words, *FLAGS])
    said = " ".join(capsys.readouterr().err.split())
    assert "5 channels: without saturation, hue, grey, which are for RGB" in said
    assert json.loads((run / "results.json").read_text())["knn"]["pixels"] >= 0
    page = (run / "report.html").read_text()
    for section in ("Nearest neighbours", "Attention", "Components of the patch features"):
        assert section in page
    assert "images cannot be opened" not in page

    found = read_stats(stats)
    backbone = dino.load(run)
    assert backbone.spec["channels"] == CHANNELS
    assert backbone.preprocessing.pixels == found.format
    assert (backbone.preprocessing.mean, backbone.preprocessing.std) == (found.mean, found.std)
    source = open_source(data, found.format)
    paths = [source.path(index) for index in range(len(source))]
    rows = backbone.embed(paths)
    expected = torch.stack([backbone.preprocess(source[index]) for index in range(len(source))])
    assert expected.shape[1] == CHANNELS
    with torch.inference_mode():
        assert np.allclose(rows, backbone(expected).numpy(), atol=1e-6)

    out = tmp_path / "F.npy"
    common = ["--weights", str(run), "--data", str(data), "--workers", "0", "--device", "cpu"]
    cli.main(["features", *common, "--out", str(out)])
    assert np.allclose(np.load(out), rows, atol=1e-6)
    cli.main(["evaluate", "knn", *common, "--k", "3", "--baseline"])
    result = written(run, "knn")
    assert result["bank"] == 12
    assert result["preprocessing"]["pixels"]["low"] == list(found.low or ())
    assert set(result["knn"]) == {"trained", "untrained", "pixels"}


def test_the_same_numbers_make_the_same_features_in_every_file(tmp_path: Path) -> None:
    form = PixelFormat(CHANNELS, 0, (0.0,), (20_000.0,))
    sources = [open_source(tiles(tmp_path / kind, kind), form) for kind in ("npy", "pages")]
    sources.append(open_source(tiles(tmp_path / "samples", "samples"), form))
    for index in range(12):
        assert torch.equal(sources[0][index], sources[1][index])
        assert torch.equal(sources[0][index], sources[2][index])


def test_python_takes_stats_too(tmp_path: Path) -> None:
    data, stats = tiles(tmp_path / "data", "npy"), tmp_path / "s.json"
    cli.main(["data", "stats", str(data), "--channels", "5", "--out", str(stats), "--workers", "0"])
    sheet = tmp_path / "sheet.png"
    words = ["--stats", str(stats), "--out", str(sheet), "--images", "2"]
    cli.main(["data", "preview", str(data), "demo", *words])
    assert sheet.exists()
    cli.main(["data", "check", str(data), "--stats", str(stats), "--workers", "0",
              "--out", str(tmp_path / "c.csv")])  # fmt: skip
    run = tmp_path / "run"
    result = dino.pretrain("demo", data=data, out=run, device="cpu", settings=TINY, stats=stats)
    assert result.finished
    config = json.loads((run / "config.json").read_text())["defining"]
    assert config["pixels.channels"] == CHANNELS
    assert config["pixels.mean"] == list(read_stats(stats).mean)


def test_stats_and_settings_that_differ_are_refused(tmp_path: Path) -> None:
    stats = tmp_path / "s.json"
    found = Stats(
        channels=2, page=None, low=None, high=None, mean=(0.5, 0.4), std=(0.1, 0.2),
        images=7, skipped=1, data="tiles",
    )  # fmt: skip
    stats.write_text(json.dumps(asdict(found)))
    assert measured(demo(), stats).pixels.format == PixelFormat(2)
    assert measured(demo().changed({"pixels.channels": 2}), stats).pixels.mean == (0.5, 0.4)
    with pytest.raises(UserError, match=r"pixels\.channels is 5, and 2 in .*s\.json: give either"):
        measured(demo().changed({"pixels.channels": 5}), stats)
    with pytest.raises(UserError, match=r"pixels\.std"):
        measured(demo().changed({"pixels.std": (1.0, 1.0)}), stats)


def test_channels_without_statistics_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'dino data stats PATH --channels 5 --out stats\.json'"):
        dino.pretrain("demo", data=[], out=tmp_path, device="cpu", settings={"pixels.channels": 5})


def test_raw_pixels_of_any_channels() -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (20, 20, CHANNELS), dtype=np.uint8) for _ in range(3)]
    source = open_source(images, PixelFormat(CHANNELS))
    mean, std = (0.5,) * CHANNELS, (0.25,) * CHANNELS
    table = raw_pixels(source, 4, mean=mean, std=std)
    assert table.features.shape == (3, CHANNELS * 16)
    assert table.features.abs().mean() < 2
