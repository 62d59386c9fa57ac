"""Components as colours: what they show, and what must not change them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dino.files import UserError
from dino.models.create import create
from dino.show.patch_pca import (
    Basis,
    Foreground,
    _nearest,
    _otsu,
    color_ends,
    components,
    load,
    mapped,
    save,
)
from dino.weights.files import read_safetensors
from dino.weights.load import fingerprint
from dino.weights.load import save as save_weights


@pytest.fixture
def tokens() -> list[Tensor]:
    """Two images whose tokens vary in three directions of different strength."""
    mix = torch.randn(3, 16) * torch.tensor([[9.0], [3.0], [1.0]])
    return [torch.einsum("chw,cd->dhw", torch.randn(3, h, w), mix) + 5 for h, w in ((6, 7), (4, 9))]


def test_one_picture_an_image(tokens: list[Tensor]) -> None:
    pictures = components(tokens, mapping="rgb")
    assert [picture.shape for picture in pictures] == [(6, 7, 3), (4, 9, 3)]
    assert all(picture.dtype == np.uint8 for picture in pictures)
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert (pixels.min(axis=0) == 0).all()
    assert (pixels.max(axis=0) == 255).all()


def test_components_come_by_strength() -> None:
    strong = torch.linspace(-10, 10, 6)[:, None].expand(6, 7)
    weak = torch.linspace(-1, 1, 7)[None].expand(6, 7)
    (picture,) = components([torch.stack([weak, strong])], spread=1.0, mapping="rgb")
    for channel, values in ((0, strong), (1, weak)):
        correlation = np.corrcoef(picture[..., channel].ravel(), values.numpy().ravel())[0, 1]
        assert correlation > 0.999  # positive: the largest loading is


def test_scale_offset_and_order_do_not_matter(tokens: list[Tensor]) -> None:
    expected = components(tokens)
    for changed in (
        [1e3 * part - 40 for part in tokens],
        [part.double() for part in tokens],
    ):
        for ours, theirs in zip(components(changed), expected, strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 1
    for ours, theirs in zip(components(tokens[::-1])[::-1], expected, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


# ------------------------------------------------------------------------------------ colours
DEFICIENCIES = {  # Machado, Oliveira and Fernandes 2009, severity 1, of linear red, green, blue
    "protanopia": [
        *([0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]),
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        *([0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]),
        [-0.011820, 0.042940, 0.968881],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def seen(rgb: np.ndarray, deficiency: str) -> np.ndarray:
    """Colours (0 to 255) as such readers see them, in CIELAB."""
    shares = rgb / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    xyz = (linear @ np.array(DEFICIENCIES[deficiency]).T).clip(0, 1) @ np.array(TO_XYZ).T
    ratios = xyz / np.array(TO_XYZ).sum(axis=1)
    f = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_two_components_are_apart_for_readers_who_confuse_red_with_green(deficiency: str) -> None:
    """Colours of a grid of the first two components, the third in the middle."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 2, [0.5], indexing="ij"), axis=-1)
    least = {}
    for mapping in ("opponent", "rgb"):
        colors = seen(mapped(grid.reshape(-1, 3), mapping).astype(float), deficiency)
        distances = np.linalg.norm(colors[:, None] - colors, axis=-1)
        least[mapping] = distances[~np.eye(len(colors), dtype=bool)].min()
    assert least["opponent"] > 9  # colours that most people can just tell apart differ by 2.3
    assert least["rgb"] < 1.3


@given(shares=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_opponent_colors_can_be_undone(shares: list[float]) -> None:
    red, green, blue = mapped(np.array(shares)).astype(float) / 255
    light = (2 * (red + green) / 2 + blue) / 3  # red and green rise by half of what blue falls
    assert light == pytest.approx(0.2 + 0.6 * shares[0], abs=0.004)
    reach = min(light, 1 - light)
    assert (light - blue) / reach == pytest.approx(2 * shares[1] - 1, abs=0.04)
    assert (red - green) / reach == pytest.approx(2 * shares[2] - 1, abs=0.04)


def test_the_ends_of_components() -> None:
    (dark, bright), (blue, yellow), (green, red) = color_ends()
    assert (dark, bright) == ((51, 51, 51), (204, 204, 204))
    assert (blue[2] > blue[0], yellow[0] == yellow[1] > yellow[2]) == (True, True)
    assert (green[1] > green[0], red[0] > red[1]) == (True, True)
    assert color_ends("rgb") == [
        ((0, 0, 0), end) for end in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]


def test_an_outlier_does_not_dim_the_rest() -> None:
    values = torch.cat([torch.linspace(0, 1, 99), torch.tensor([50.0])])
    tokens = torch.stack([values, torch.zeros(100)]).view(2, 10, 10)
    (picture,) = components([tokens], spread=0.96, mapping="rgb")
    assert picture[..., 0].ravel()[:99].std() > 60
    (dim,) = components([tokens], spread=1.0, mapping="rgb")
    assert dim[..., 0].ravel()[:99].std() < 5


@pytest.mark.parametrize(
    "constant",
    [torch.ones(8, 3, 4), torch.zeros(8, 3, 4), torch.full((8, 3, 4), 0.1), torch.ones(8, 1, 1)],
)
def test_constant_tokens_are_grey(constant: Tensor) -> None:
    assert (components([constant])[0] == 128).all()


def test_fewer_directions_than_colors() -> None:
    ramp = torch.linspace(0, 1, 12).view(1, 3, 4).repeat(5, 1, 1)
    (picture,) = components([ramp], mapping="rgb")
    assert picture[..., 0].min() == 0
    assert picture[..., 0].max() == 255
    assert (picture[..., 1:] == 128).all()
    (narrow,) = components([torch.randn(2, 3, 4)], mapping="rgb")  # only two dimensions
    assert (narrow[..., 2] == 128).all()


# ------------------------------------------------------------------------------------------ basis
def object_tokens(seed: int, height: int = 8, width: int = 9, strength: float = 4.0) -> Tensor:
    """Patches of a rectangle off the border that differ from the others in one direction."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(16, height, width, generator=generator)
    tokens[5, 2:6, 3:7] += strength
    return tokens


def inside(height: int = 8, width: int = 9) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[2:6, 3:7] = True
    return mask


def test_projection_equals_that_of_the_definition(tokens: list[Tensor]) -> None:
    basis = Basis.fit(tokens)
    rows = np.concatenate([part.flatten(1).T.double().numpy() for part in tokens])
    centred = rows - rows.mean(axis=0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    found = np.concatenate([basis.project(part).reshape(-1, 3) for part in tokens])
    for index, vector in enumerate(vectors[:3]):
        sign = np.sign(vector[np.abs(vector).argmax()])
        assert found[:, index] == pytest.approx(sign * centred @ vector, abs=1e-9)
    assert basis.variance == pytest.approx(values[:3] ** 2 / (values**2).sum())


def test_an_image_has_the_same_colors_alone_and_among_others(tokens: list[Tensor]) -> None:
    basis = Basis.fit(tokens)
    assert np.array_equal(basis.colors(tokens[1]), components(tokens)[1])
    other = object_tokens(0)
    assert np.array_equal(basis.colors(other), basis.colors(other.clone()))
    assert (basis.shares(1e6 * other) % 1 == 0).mean() > 0.9  # beyond both ends


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-2, 1e3), offset=st.floats(-50, 50))
def test_foreground_and_parts_do_not_depend_on_scale_offset_and_order(
    seed: int, scale: float, offset: float
) -> None:
    images = [object_tokens(seed).double(), object_tokens(seed + 1, 7, 10).double()]
    found = Foreground.fit(images)
    changed = [scale * image + offset for image in images][::-1]
    other = Foreground.fit(changed)
    for image, mirrored in zip(images, changed[::-1], strict=True):
        values = (image.flatten(1).T.numpy() - found.mean) @ found.direction - found.threshold
        sure = np.abs(values).reshape(image.shape[1:]) > 1e-6
        assert np.array_equal(found(image)[sure], other(mirrored)[sure])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_that_avoids_the_border(sign: int) -> None:
    images = [sign * object_tokens(seed, strength=8.0) for seed in range(3)]
    divide = Foreground.fit(images)
    for image in images:
        assert np.array_equal(divide(image), inside())


def test_otsu_is_the_best_of_all_thresholds() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 12, 25) * 1.0
        threshold = _otsu(values)

        def within(limit: float, values: np.ndarray = values) -> float:
            sides = (values[values <= limit], values[values > limit])
            return sum(((side - side.mean()) ** 2).sum() for side in sides if len(side))

        best = min(within(limit) for limit in np.unique(values)[:-1])
        assert within(threshold) == pytest.approx(best)


def test_components_of_the_foreground_leave_the_background_out() -> None:
    images = [object_tokens(seed, strength=8.0) for seed in range(3)]
    for image in images:
        image[7, 2:6, 3:7] += torch.linspace(-3, 3, 4)[:, None]  # varies within the object
    plain, basis = Basis.fit(images), Basis.fit(images, foreground=True)
    assert np.abs(plain.directions[0]).argmax() == 5
    assert np.abs(basis.directions[0]).argmax() == 7
    assert basis.foreground is not None
    rows = np.concatenate([im.flatten(1).T.numpy()[inside().ravel()] for im in images])
    assert basis.mean == pytest.approx(rows.mean(axis=0), abs=1e-5)


def test_parts_are_clusters_the_largest_first() -> None:
    image = object_tokens(0, strength=0.0) / 10
    labels = np.zeros((8, 9), dtype=int)
    labels[2:6, 3:7], labels[0, :3] = 1, 2
    for number in range(3):
        image[number, torch.from_numpy(labels == number)] += 3
    basis = Basis.fit([image], parts=3)
    assert basis.centers is not None
    assert np.array_equal(basis.parts(image), labels)
    assert np.array_equal(basis.parts(50 * image), labels)  # by direction, not by length
    again = Basis.fit([image], parts=3).centers
    assert again is not None
    assert np.array_equal(again, basis.centers)
    with pytest.raises(UserError, match="4 patches cannot be divided into 5 parts"):
        Basis.fit([image[:, :2, :2]], parts=5)


def test_a_patch_belongs_to_the_nearest_center() -> None:
    rows, centers = np.random.default_rng(0).standard_normal((2, 30, 4))
    centers = centers[:5] * np.arange(1, 6)[:, None] / 3  # of different lengths
    distances = np.linalg.norm(rows[:, None] - centers, axis=2)
    assert np.array_equal(_nearest(rows, centers), distances.argmin(axis=1))


def test_fewer_kinds_of_patches_than_parts() -> None:
    basis = Basis.fit([torch.ones(4, 3, 3)], parts=3)
    assert (basis.parts(torch.ones(4, 3, 3)) == basis.parts(torch.ones(4, 1, 1))).all()


@pytest.mark.parametrize("constant", [torch.ones(8, 3, 4), torch.full((8, 3, 4), 0.1)])
def test_patches_that_are_alike_have_no_foreground(constant: Tensor) -> None:
    with pytest.raises(UserError, match="leave out --foreground"):
        Foreground.fit([constant])


# ------------------------------------------------------------------------------------------ files
@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return create("vit_tiny", embed_dim=16, depth=1, heads=2, patch_size=4, image_size=8)


@pytest.mark.parametrize("options", [{}, {"foreground": True, "parts": 3}, {"parts": 2}])
def test_a_saved_basis_is_the_same_basis(tmp_path: Path, network: Any, options: Any) -> None:
    images = [object_tokens(seed) for seed in range(2)]
    basis = Basis.fit(images, **options)
    save(basis, tmp_path / "b.safetensors", network, {"size": 24, "block": 0, "data": "photos/"})
    loaded, about = load(tmp_path / "b.safetensors", network)
    assert (about["size"], about["block"], about["data"]) == (24, 0, "photos/")
    for image in images:
        assert np.array_equal(loaded.project(image), basis.project(image))
        assert np.array_equal(loaded.colors(image), basis.colors(image))
        if basis.foreground is not None:
            assert loaded.foreground is not None
            assert np.array_equal(loaded.foreground(image), basis.foreground(image))
        if basis.centers is not None:
            assert np.array_equal(loaded.parts(image), basis.parts(image))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_basis_of_the_network_is_refused(tmp_path: Path, network: Any) -> None:
    path, good = tmp_path / "b.safetensors", Basis.fit([object_tokens(0)], foreground=True)
    about = {"size": 24, "block": 0}
    with pytest.raises(UserError, match=r"there is no basis .*b\.safetensors: write one"):
        load(path, network)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors"):
        load(path, network)
    save_weights(network, path)
    with pytest.raises(UserError, match="is no basis of components"):
        load(path, network)
    other = create("vit_tiny", embed_dim=16, depth=1, heads=2, patch_size=4, image_size=8)
    save(good, path, other, about)
    with pytest.raises(UserError, match="is of other weights"):
        load(path, network)
    for changes in ({"low": np.zeros(2)}, {"mean": np.full(16, np.nan)}, {"mean": np.zeros(15)}):
        save(replace(good, **changes), path, network, about)
        with pytest.raises(UserError, match="is damaged"):
            load(path, network)
    save(good, path, network, {"size": 24})
    with pytest.raises(UserError, match="is damaged"):
        load(path, network)
    tensors = read_safetensors(path)[0]
    for name in ("high", "foreground.threshold"):
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        content = {"weights": fingerprint(network), **about}
        save_file(fewer, path, metadata={"dino-basis": json.dumps(content)})
        with pytest.raises(UserError, match="is damaged"):
            load(path, network)
    save_file(tensors, path, metadata={"dino-basis": "{"})
    with pytest.raises(UserError, match="is damaged"):
        load(path, network)
