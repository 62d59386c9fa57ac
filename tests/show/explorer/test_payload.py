"""What travels in the page: rounded features and their error, attention, pictures."""

from __future__ import annotations

import base64
import io
import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino.show.explorer import payload
from dino.show.explorer.patches import PatchFeatures


def image(
    seed: int = 0,
    grid: tuple[int, int] = (3, 4),
    dim: int = 6,
    heads: int = 2,
    scale: float = 1.0,
    size: tuple[int, int] = (32, 24),
) -> PatchFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(dim, *grid, generator=generator)
    attention = torch.rand(heads, *grid, generator=generator).softmax(dim=-1)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return PatchFeatures(
        f"{seed}.png", Image.fromarray(noise), features, attention if heads else None
    )


def unpacked(content: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, K], attention [heads, n] and colours [n, 3]: the page's decoder in Python."""
    one = content["images"][index]
    data = np.frombuffer(zlib.decompress(base64.b64decode(one["data"])), np.uint8)
    n, dim, wide, heads = (
        one["rows"] * one["columns"],
        *(content[name] for name in ("dimensions", "wide", "heads")),
    )
    ends = np.cumsum([dim * n, wide * n, heads * n, heads * n, 3 * n])
    low, high, att_low, att_high, colors = np.split(data, ends[:-1])
    assert len(data) == ends[-1]
    features = low.view(np.int8).astype(int).reshape(dim, n)
    features[:wide] = low[: wide * n].reshape(wide, n) + 256 * high.view(np.int8).astype(
        int
    ).reshape(wide, n)
    levels = (att_low + 256.0 * att_high).reshape(heads, n)
    return features.T, levels * np.array(one["peaks"]).reshape(-1, 1) / 65535, colors.reshape(n, 3)


def cosines(rows: Any) -> np.ndarray:
    unit = F.normalize(torch.as_tensor(np.asarray(rows, dtype=np.float64)), dim=1)
    return (unit @ unit.T).numpy()


@given(
    seed=st.integers(0, 1000),
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    dim=st.integers(1, 40),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
)
def test_the_stated_error_holds_for_every_pair(
    seed: int, grids: list[tuple[int, int]], dim: int, scale: float, offset: float
) -> None:
    images = [image(seed + i, grid, dim, 0) for i, grid in enumerate(grids)]
    images = [one._replace(features=scale * (one.features + offset)) for one in images]
    exact = torch.cat([one.features.flatten(1).T for one in images]).double()
    content = payload.content(images)
    found = np.concatenate([unpacked(content, index)[0] for index in range(len(images))])
    error = np.abs(cosines(found) - cosines(exact)).max()
    assert content["pairs"] == len(exact) ** 2
    assert error == pytest.approx(content["error"], abs=2e-6)
    assert error <= 2 * dim**0.5 * payload.STEP  # half a step in each component, in either feature


def test_only_some_queries_are_compared_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payload, "QUERIES", 5)
    rows = F.normalize(torch.randn(20, 8), dim=1)
    steps = (rows / 0.1).round()
    error, pairs = payload.largest_error(rows, steps)
    full = np.abs(cosines(steps) - cosines(rows))
    assert pairs == 100
    assert error == pytest.approx(full[[2, 6, 10, 14, 18]].max(), abs=1e-6)


def test_large_components_take_two_bytes() -> None:
    images = [image(seed, dim=30) for seed in range(2)]
    images = [one._replace(features=one.features + 5) for one in images]
    content = payload.content(images)
    found = unpacked(content, 1)[0]
    assert 1 <= content["wide"] < 5
    assert np.abs(found[:, : content["wide"]]).max() > 127
    assert np.abs(cosines(found) - cosines(images[1].features.flatten(1).T)).max() < 0.01


def test_components_without_any_step_are_left_out() -> None:
    plane = torch.zeros(50, 3, 4)
    plane[[7, 31]] = torch.randn(2, 3, 4)
    content = payload.content([image()._replace(features=plane)])
    assert content["dimensions"] == 2


def test_constant_and_empty_features_are_taken() -> None:
    ones, zeros = torch.ones(4, 2, 3), torch.zeros(4, 2, 3)
    content = payload.content([image(grid=(2, 3))._replace(features=x) for x in (ones, zeros)])
    assert np.allclose(cosines(unpacked(content, 0)[0]), 1)
    assert not unpacked(content, 1)[0].any()
    assert content["error"] < 0.01
    assert not unpacked(payload.content([image()._replace(features=torch.zeros(4, 3, 4))]), 0)[
        0
    ].any()


def test_attention_has_the_error_of_its_levels() -> None:
    images = [image(3), image(4, grid=(2, 5))]
    content = payload.content(images)
    for index, one in enumerate(images):
        assert one.attention is not None
        exact = one.attention.flatten(1).numpy()
        found = unpacked(content, index)[1]
        assert np.abs(found - exact).max() <= exact.max() / 65535
    assert json.loads(json.dumps(content)) == content


def test_networks_without_attention() -> None:
    content = payload.content([image(heads=0)])
    assert content["heads"] == 0
    assert content["images"][0]["peaks"] == []
    assert unpacked(content, 0)[1].shape == (0, 12)


def test_colors_are_those_of_the_components_of_all_images() -> None:
    from dino.show.patch_pca import components

    images = [image(5, dim=9), image(6, grid=(2, 2), dim=9)]
    content = payload.content(images)
    for index, expected in enumerate(components([one.features for one in images])):
        assert (unpacked(content, index)[2].reshape(expected.shape) == expected).all()


def test_pictures_are_small_and_tell_nothing_else() -> None:
    large = image(7, size=(1500, 1000)).picture
    large.info["comment"] = b"taken at home"
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    large.info["exif"] = exif.tobytes()
    (one,) = payload.content([image(7)._replace(picture=large)])["images"]
    data = base64.b64decode(one["picture"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (960, 640)
    assert (one["width"], one["height"]) == (1500, 1000)
    assert b"taken at home" not in data


def test_features_of_a_patch_take_fewer_bytes_than_numbers() -> None:
    noise = image(8, grid=(60, 60), dim=384, heads=6)
    one = payload.content([noise])["images"][0]
    assert len(one["data"]) < 4 / 3 * 3600 * (384 * 0.75 + 6 * 2 + 3)
