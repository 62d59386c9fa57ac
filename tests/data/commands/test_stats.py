"""`dino data stats`: ranges, means and deviations against the plain formulas."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dicoms import dicom
from PIL import Image

from dino import cli
from dino.data.commands.check import Check
from dino.data.commands.stats import SIDE, Stats, StatsSettings, measure, read_stats
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.open import open_source
from dino.data.views.random_streams import generator
from dino.data.views.view_spec import ViewSettings
from dino.files import UserError
from dino.settings import validated
from dino.train.cli_arguments import Preview

pytestmark = pytest.mark.usefixtures("unchecked")  # tyro hands over its MISSING for a string


def folder(root: Path, images: list[np.ndarray]) -> Path:
    root.mkdir()
    for number, values in enumerate(images):
        np.save(root / f"{number:02}.npy", values)
    return root


def drawn(values: np.ndarray, index: int) -> np.ndarray:
    """The values [C, N] of image `index` that are looked at."""
    places = generator(0, 0, index).integers(values[0].size, size=(SIDE, SIDE)).ravel()
    return values.reshape(len(values), -1)[:, places]


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    """Five channels of 16 bits of very different ranges."""
    random = np.random.default_rng(0)
    scale = np.array([100, 900, 3000, 20, 60_000])[:, None, None]
    sizes = [(20 + number, 25) for number in range(6)]
    return [(random.gamma(2, 0.1, (5, *size)) * scale).clip(0, 65535).astype(np.uint16)
            for size in sizes]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_other_types_are_measured_by_their_tails(
    tiles: list[np.ndarray], tmp_path: Path, workers: int
) -> None:
    source = open_source(folder(tmp_path / "a", tiles), PixelFormat(5))
    stats, skipped = measure(source, PixelFormat(5), workers=workers, data="tiles")
    sampled = np.concatenate([drawn(values, index) for index, values in enumerate(tiles)], axis=1)
    low, high = np.percentile(sampled, (0.1, 99.9), axis=1)
    assert stats.low == pytest.approx(low.tolist())
    assert stats.high == pytest.approx(high.tolist())
    levels = np.rint((sampled - low[:, None]) / (high - low)[:, None] * 255).clip(0, 255)
    assert stats.mean == pytest.approx((levels / 255).mean(axis=1).tolist(), abs=1e-4)
    assert stats.std == pytest.approx((levels / 255).std(axis=1).tolist(), abs=1e-4)
    assert (stats.channels, stats.images, stats.skipped, stats.data) == (5, 6, 0, "tiles")
    assert skipped == []


def test_eight_bits_keep_their_range(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    images = [random.integers(50, 200, (30, 20, 3), dtype=np.uint8) for _ in range(4)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    stats, _ = measure(open_source(tmp_path), RGB)
    assert (stats.low, stats.high) == (None, None)
    sampled = [drawn(image.transpose(2, 0, 1), index) for index, image in enumerate(images)]
    every = np.concatenate(sampled, axis=1) / 255
    assert stats.mean == pytest.approx(every.mean(axis=1).tolist())
    assert stats.std == pytest.approx(every.std(axis=1).tolist())
    narrow, _ = measure(open_source(tmp_path), RGB, range="percentile")
    assert narrow.low == pytest.approx((50, 50, 50), abs=2)
    assert max(narrow.std) > 1.5 * max(stats.std)


def test_a_range_that_is_given_is_used(tiles: list[np.ndarray], tmp_path: Path) -> None:
    form = PixelFormat(5, 0, (0.0,), (1000.0,))
    stats, _ = measure(open_source(folder(tmp_path / "a", tiles), form), form)
    assert (stats.low, stats.high) == ((0.0,), (1000.0,))
    assert stats.mean[4] > 0.9 > 0.1 > stats.mean[0]
    bright = [values[4:] for values in tiles]
    one = PixelFormat(1)
    full, _ = measure(open_source(folder(tmp_path / "b", bright), one), one, range="full")
    assert full.low is None
    expected = np.mean([values.mean() for values in bright]) / 65535
    assert full.mean[0] == pytest.approx(expected, rel=0.03)


def test_a_sample_is_spread_and_bad_images_are_left_out(tmp_path: Path) -> None:
    images = [np.full((4, 4, 2), number, np.uint16) for number in range(100)]
    source = open_source(folder(tmp_path / "a", images), PixelFormat(2))
    (tmp_path / "a" / "55.npy").write_bytes(b"")
    (tmp_path / "a" / "25.npy").unlink()
    stats, skipped = measure(source, PixelFormat(2), images=10)
    assert [(Path(error.path).name, error.defect) for error in skipped] == [
        ("25.npy", "missing"),
        ("55.npy", "empty"),
    ]
    assert (stats.images, stats.skipped) == (8, 2)
    assert (stats.low, stats.high) == ((5.0, 5.0), (95.0, 95.0))


def test_values_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20, 1)
    values[3:6] = np.nan
    values[7] = np.inf
    stats, _ = measure(
        open_source(folder(tmp_path / "a", [values]), PixelFormat(1)), PixelFormat(1)
    )
    assert stats.low == pytest.approx((-1,), abs=0.02)
    assert stats.high == pytest.approx((1,), abs=0.02)


def test_rare_values_set_the_range(tmp_path: Path) -> None:
    values = np.zeros((64, 64, 1), np.float32)
    values[0, 0] = 9
    images = [values] * 400
    stats, _ = measure(open_source([*images]), PixelFormat(1))
    assert (stats.low, stats.high) == ((0.0,), (9.0,))


def test_sources_that_know_levels_only() -> None:
    class Levels:
        labels = classes = None

        def __len__(self) -> int:
            return 3

        def path(self, index: int) -> str:
            return f"item {index}"

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.arange(12, dtype=torch.uint8).view(2, 2, 3)

    stats, _ = measure(Levels(), PixelFormat(2))
    assert stats.low is None
    assert stats.mean == pytest.approx((2.5 / 255, 8.5 / 255), rel=0.1)


def test_dicoms_with_windows(tmp_path: Path) -> None:
    ramp = np.arange(400, dtype=np.uint16).reshape(20, 20) * 10
    for number in range(2):
        dicom(tmp_path / f"{number}.dcm", ramp, WindowCenter=1000, WindowWidth=100)
    windowed, _ = measure(open_source(tmp_path), PixelFormat(1))
    assert windowed.low is None  # each file has a separate window
    full, _ = measure(open_source(tmp_path), PixelFormat(1), range="percentile")
    assert full.low == pytest.approx((0,), abs=20)
    assert full.high == pytest.approx((3990,), abs=20)


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        ([np.zeros((4, 4, 2), np.uint8)], {}, "channel 0 is 0 in all sampled pixels"),
        ([np.ones((4, 4, 2), np.uint16)], {}, "channel 0 is 1 in all"),
        ([np.full((4, 4, 2), np.nan)], {}, "channel 0 has no finite value"),
        (
            [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 2), np.uint16)],
            {},
            r"00\.npy has 8 bits and .*01\.npy has not: give images of one kind, or say --range",
        ),
        ([np.zeros((4, 4, 3), np.uint8)], {}, "none of 1 images can be used, the first: .*3 chan"),
    ],
)
def test_what_cannot_be_measured(
    images: list[np.ndarray], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    two = PixelFormat(2)
    with pytest.raises(UserError, match=sentence) as caught:
        measure(open_source(folder(tmp_path / "a", images), two), two, **options)
    assert not isinstance(caught.value, ImageError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (StatsSettings(data="demo", channels=0), "channels"),
        (StatsSettings(data="demo", page=-1), "page"),
        (StatsSettings(data="demo", images=0), "images"),
        (StatsSettings(data="demo", workers=-1), "workers"),
        (StatsSettings(data="demo", low=(math.nan,), high=(1.0,)), "low"),
        (Check(data="demo", channels=0), "channels"),
        (Check(data="demo", page=-1), "page"),
        (Check(data="demo", workers=1001), "workers"),
        (Preview(data="demo", images=0), "images"),
        (Preview(data="demo", epoch=-1), "epoch"),
        (Preview(data="demo", seed=-1), "seed"),
        (Preview(data="demo", views=ViewSettings(local_size=0)), "views.local_size"),
    ],
)
def test_settings_of_data_commands_have_ranges(settings: Any, field: str) -> None:
    with pytest.raises(UserError, match=rf"^{field} is .*: it must be"):
        validated(settings)


# ---------------------------------------------------------------------------------- files
STATS = Stats(
    channels=2, page=1, low=(0.0, 1.0), high=(5.0, 6.0), mean=(0.5, 0.4), std=(0.1, 0.2),
    images=7, skipped=1, data="tiles",
)  # fmt: skip


def test_the_command_writes_what_stats_takes(
    tiles: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folder(tmp_path / "a", tiles), tmp_path / "stats.json"
    (data / "00.npy").write_bytes(b"no")
    words = ["data", "stats", str(data), "--channels", "5", "--out", str(out), "--workers", "0"]
    cli.main(words)
    printed = capsys.readouterr().out
    assert "channel" in printed
    assert "1 images could not be used (1 not an image), the first: " in printed
    content = json.loads(out.read_text())
    assert list(content) == [
        *("channels", "page", "low", "high", "nodata", "mean", "std", "images", "skipped", "data"),
        "nodata_share",
    ]
    stats = read_stats(out)
    assert (stats.images, stats.skipped, stats.data) == (5, 1, str(data))
    assert stats.format == PixelFormat(5, None, stats.low, stats.high)
    cli.main([*words, "--low", "0", "--high", "1000", "--images", "3"])
    assert read_stats(out).low == (0.0,)


def test_files_of_statistics(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(asdict(STATS)))
    assert read_stats(path) == STATS
    good = asdict(STATS)
    for wrong, sentence in (
        ({**good, "gamma": 1}, "s.json is damaged .an object with the keys channels, data"),
        ({k: v for k, v in good.items() if k != "std"}, "missing 1 required .*std"),
        ([], "an object with the keys"),
        ({**good, "std": [0.1, 0]}, "std is .*numbers above 0"),
        ({**good, "mean": None}, "mean is None: it must be numbers"),
        ({**good, "low": [0.0, 9.0]}, "low must lie below high"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=sentence):
            read_stats(path)
