"""Pictures of attention: which there are, what they show, and their legends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data.images.map_overlay import CATEGORIES, composite, overlay, stencil
from dino.models.attention import mass_mask
from dino.show.attention_pictures import (
    TILE,
    HeadMaps,
    _percent,
    head_rows,
    pictures,
    sheet,
    summary,
)

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def found(count: int = 3, heads: list[int] | None = None, mass: float = 0.6) -> HeadMaps:
    """Heads whose attention is more and more concentrated, but for the last, which is even."""
    maps = 0.2 * torch.rand(count, 4, 6) + 0.5
    for place in range(count - 1):
        maps[place, 1, 2] += 6 * place + 2
    maps[-1] = 1
    maps = maps / maps.sum(dim=(1, 2), keepdim=True) * 0.9
    return HeadMaps(maps, heads or list(range(count)), mass)


def test_masks_areas_and_the_most_concentrated_head() -> None:
    heads = found(4)
    assert torch.equal(heads.masks, mass_mask(heads.maps, 0.6))
    assert heads.areas == [float(mask.double().mean()) for mask in heads.masks]
    assert heads.best == heads.areas.index(min(heads.areas)) == 2
    equal = HeadMaps(torch.ones(3, 2, 5), [4, 5, 6], 0.6)
    assert equal.best == 0


def test_the_mean_is_that_of_the_heads() -> None:
    heads = found()
    torch.testing.assert_close(heads.mean.maps, heads.maps.mean(dim=0, keepdim=True))
    assert torch.equal(heads.mean.masks, mass_mask(heads.mean.maps, 0.6))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["mean"], ["mean"]),
        (["best", "composite"], ["best", "composite"]),
        (["heads"], ["head0", "head4", "head2"]),
        (["sheet", "masks"], ["mean-mask", "head0-mask", "head4-mask", "head2-mask"]),
        (["sheet"], []),
    ],
)
def test_what_is_requested_is_shown(kinds: list[str], expected: list[str]) -> None:
    shown = list(pictures(IMAGE, found(heads=[0, 4, 2]), kinds))
    assert [one.name for one in shown] == expected
    assert all(one.picture.size == IMAGE.size for one in shown)
    assert all((one.legend is None) == one.name.endswith("mask") for one in shown)


def test_pictures_show_their_maps() -> None:
    heads = found()
    kinds = ["mean", "best", "heads", "masks", "composite"]
    shown = {one.name: one.picture for one in pictures(IMAGE, heads, kinds)}
    expected = {
        "mean": overlay(IMAGE, heads.mean.maps[0]),
        "best": overlay(IMAGE, heads.maps[1]),
        "head0": overlay(IMAGE, heads.maps[0]),
        "mean-mask": stencil(heads.mean.masks[0], IMAGE.size),
        "head2-mask": stencil(heads.masks[2], IMAGE.size),
        "composite": composite(IMAGE, heads.maps, heads.masks, CATEGORIES[:3]),
    }
    for name, picture in expected.items():
        assert shown[name].tobytes() == picture.tobytes(), name
    (fixed,) = pictures(IMAGE, heads, ["best"], best=2)
    assert fixed.picture.tobytes() == overlay(IMAGE, heads.maps[2]).tobytes()


def test_the_query_is_marked_but_in_masks() -> None:
    heads = found()
    for kind in ("mean", "best", "heads", "masks", "composite"):
        plain, marked = (list(pictures(IMAGE, heads, [kind], query)) for query in (None, (12, 30)))
        for one, other in zip(plain, marked, strict=True):
            changed = np.asarray(one.picture) != np.asarray(other.picture)
            if kind == "masks":
                assert not changed.any()
            else:
                rows, columns = np.nonzero(changed.any(axis=2))
                assert abs(rows.mean() - 30) < 1
                assert abs(columns.mean() - 12) < 1


def test_heads_without_a_color_are_the_least_concentrated() -> None:
    heads = found(10)
    assert len(heads.colors) == len(CATEGORIES)
    left_out = {*range(10)} - heads.colors.keys()
    assert min(heads.areas[place] for place in left_out) >= max(
        heads.areas[place] for place in heads.colors
    )
    assert list(heads.colors.values()) == list(CATEGORIES)
    assert "without the 3 least concentrated" in summary(IMAGE, "a", heads)[-1].caption
    assert found(3).colors == dict(enumerate(CATEGORIES[:3]))


@pytest.mark.parametrize("size", [(60, 40), (2000, 300), (16, 500)])
def test_cells_fit_into_a_sheet_without_shrinking(size: tuple[int, int]) -> None:
    image, heads = IMAGE.resize(size), found(8)
    rows = [summary(image, "a.jpg", heads, (3, 3)), *head_rows(image, heads)]
    assert [len(row) for row in rows] == [5, 6, 2]
    assert all(max(cell.picture.size) <= TILE for row in rows for cell in row)
    assert rows[0][0].caption == f"a.jpg\n{size[0]} x {size[1]} px"
    assert rows[0][3].caption.startswith(f"most concentrated: head {heads.best}\n60 % in ")
    assert [cell.caption.split("\n")[0] for cell in rows[2]] == ["head 6", "head 7"]
    assert sheet(rows, "title").width > 6 * TILE


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0000099, 0.0112, ("0.0 %", "1.1 %")),
        (0.00039, 0.0049, ("0.04 %", "0.49 %")),
        (0.1, 0.52, ("10 %", "52 %")),
        (0.0, 0.0, ("0.000 %", "0.000 %")),
    ],
)
def test_ranges_have_two_digits(low: float, high: float, expected: tuple[str, str]) -> None:
    assert _percent(low, high) == expected
