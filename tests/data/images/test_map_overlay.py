"""Pictures of maps."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dino.data.images.highlight import DIM
from dino.data.images.map_overlay import (
    CATEGORIES,
    COLORS,
    OPAQUE,
    colored,
    composite,
    cut_out,
    outlined,
    overlay,
    ringed,
    stencil,
)


def test_colors_go_from_the_smallest_to_the_largest() -> None:
    values = torch.tensor([[-3.0, 5.0], [1.0, -3.0]])
    found = np.asarray(colored(values, "viridis"))
    first, middle, last = (bytes.fromhex(COLORS["viridis"].split()[i]) for i in (0, 8, 16))
    assert found.shape == (2, 2, 3)
    assert found[0, 0].tolist() == [*first]
    assert found[0, 1].tolist() == [*last]
    assert found[1, 0].tolist() == [*middle]


def test_a_constant_map_is_one_color() -> None:
    found = np.asarray(colored(torch.full((2, 2), 0.3), "viridis"))
    assert (found == found[0, 0]).all()


def test_overlay_blends_by_strength() -> None:
    image = Image.new("RGB", (6, 4), (200, 100, 0))
    values = torch.rand(2, 3)
    heat = colored(values, "inferno").resize((6, 4), Image.Resampling.NEAREST)
    assert overlay(image, values, strength=0.0).tobytes() == image.tobytes()
    assert overlay(image, values, strength=1.0).tobytes() == heat.tobytes()
    assert overlay(image, values).size == image.size


# -------------------------------------------------------------------------------------- masks
MASK = torch.tensor([[True, False, False], [True, True, False]])


def test_a_mask_is_enlarged_to_the_image() -> None:
    found = np.asarray(stencil(MASK, (30, 20)))
    assert np.array_equal(found > 0, np.kron(MASK.numpy(), np.ones((10, 10))) > 0)
    assert set(found.ravel().tolist()) == {0, 255}


def test_outside_of_a_mask_the_image_is_dim_and_grey() -> None:
    image = Image.new("RGB", (30, 20), (200, 100, 0))
    found = np.asarray(cut_out(image, MASK))
    inside = np.asarray(stencil(MASK, image.size)) > 0
    assert (found[inside] == (200, 100, 0)).all()
    outside = found[~inside]
    assert (outside == outside[0]).all()
    assert len(set(outside[0].tolist())) == 1
    assert outside[0, 0] < 60


def test_the_line_lies_inside_of_the_mask() -> None:
    image = Image.new("RGB", (30, 20), (200, 100, 0))
    found = np.asarray(outlined(image, MASK))
    inside = np.asarray(stencil(MASK, image.size)) > 0
    changed = (found != (200, 100, 0)).any(axis=2)
    assert not (changed & ~inside).any()
    assert (found[0:9, 9] == 255).all()  # along the right side of the first patch
    assert (found[0, 0] == (200, 100, 0)).all()  # the border of the image is none of the mask
    assert (found[10, 11:19] == 255).all()  # above the patch in the middle of the second row


def test_the_line_around_nothing_and_everything_is_none() -> None:
    image = Image.new("RGB", (30, 20), (200, 100, 0))
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        assert outlined(image, mask).tobytes() == image.tobytes()


# ---------------------------------------------------------------------------------- composite
def test_a_patch_has_the_color_of_the_map_that_is_largest_for_its_maximum() -> None:
    image = Image.new("RGB", (30, 10), (255, 255, 255))
    maps = torch.tensor([[[10.0, 5.0, 0.0]], [[0.1, 0.09, 0.02]]])
    masks = torch.tensor([[[True, True, False]], [[False, True, False]]])
    found = np.asarray(composite(image, maps, masks, CATEGORIES[:2])).astype(int)
    dim = np.array([255 * DIM] * 3)
    for column, color, ratio in ((0, CATEGORIES[0], 1.0), (1, CATEGORIES[1], 0.9)):
        expected = dim + OPAQUE * ratio**0.5 * (np.array(color) - dim)
        patch = found[:, 10 * column : 10 * column + 10].reshape(-1, 3)
        assert np.abs(patch - expected).max() <= 2
    assert np.abs(found[:, 20:] - dim).max() <= 1  # no mask holds it


def test_a_map_of_zeros_has_no_color() -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    zeros, masks = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    found = np.asarray(composite(image, zeros, masks, CATEGORIES[:1]))
    assert np.abs(found - 255 * DIM).max() <= 1


def test_the_ring_is_around_its_point() -> None:
    image = Image.new("RGB", (100, 80), (128, 128, 128))
    rows, columns = np.nonzero((np.asarray(ringed(image, 30, 40)) != 128).any(axis=2))
    assert abs(columns.mean() - 30) < 1
    assert abs(rows.mean() - 40) < 1
    assert (np.asarray(ringed(image, 30, 40))[40, 30] == 128).all()
    assert np.asarray(image).max() == 128


def test_categories_differ_for_any_color_vision() -> None:
    """Simulated by Machado 2009 (severity 1), all pairs differ clearly in Lab."""
    from skimage.color import rgb2lab

    simulated = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    rgb = np.array(CATEGORIES) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in (np.eye(3), *map(np.array, simulated.values())):
        shown = (linear @ matrix.T).clip(0, 1)
        encoded = np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)
        lab = rgb2lab(encoded[None])[0]
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
        assert distances[~np.eye(len(rgb), dtype=bool)].min() > 12
