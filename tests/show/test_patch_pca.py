"""Components as colours: what they show, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.show.patch_pca import components


@pytest.fixture
def tokens() -> list[Tensor]:
    """Two images whose tokens vary in three directions of different strength."""
    mix = torch.randn(3, 16) * torch.tensor([[9.0], [3.0], [1.0]])
    return [torch.einsum("chw,cd->dhw", torch.randn(3, h, w), mix) + 5 for h, w in ((6, 7), (4, 9))]


def test_one_picture_an_image(tokens: list[Tensor]) -> None:
    pictures = components(tokens)
    assert [picture.shape for picture in pictures] == [(6, 7, 3), (4, 9, 3)]
    assert all(picture.dtype == np.uint8 for picture in pictures)
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert (pixels.min(axis=0) == 0).all()
    assert (pixels.max(axis=0) == 255).all()


def test_components_come_by_strength() -> None:
    strong = torch.linspace(-10, 10, 6)[:, None].expand(6, 7)
    weak = torch.linspace(-1, 1, 7)[None].expand(6, 7)
    (picture,) = components([torch.stack([weak, strong])], spread=1.0)
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


def test_an_outlier_does_not_dim_the_rest() -> None:
    values = torch.cat([torch.linspace(0, 1, 99), torch.tensor([50.0])])
    tokens = torch.stack([values, torch.zeros(100)]).view(2, 10, 10)
    (picture,) = components([tokens], spread=0.96)
    assert picture[..., 0].ravel()[:99].std() > 60
    (dim,) = components([tokens], spread=1.0)
    assert dim[..., 0].ravel()[:99].std() < 5


@pytest.mark.parametrize(
    "constant",
    [torch.ones(8, 3, 4), torch.zeros(8, 3, 4), torch.full((8, 3, 4), 0.1), torch.ones(8, 1, 1)],
)
def test_constant_tokens_are_grey(constant: Tensor) -> None:
    assert (components([constant])[0] == 128).all()


def test_fewer_directions_than_colors() -> None:
    ramp = torch.linspace(0, 1, 12).view(1, 3, 4).repeat(5, 1, 1)
    (picture,) = components([ramp])
    assert picture[..., 0].min() == 0
    assert picture[..., 0].max() == 255
    assert (picture[..., 1:] == 128).all()
    (narrow,) = components([torch.randn(2, 3, 4)])  # only two dimensions
    assert (narrow[..., 2] == 128).all()
