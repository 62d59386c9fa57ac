"""JPEGs decoded smaller: the same views within half a level of 255, or not smaller at all."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino.data.images.decode import as_pixels, crop_resize, open_image, read_image
from dino.data.images.jpeg_scale import SPARE, reduced_box, reduction
from dino.data.loader import Batch, PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.demo import photographs
from dino.data.sources.open import open_source
from dino.data.views.random_streams import draw_views, generator
from dino.data.views.view_spec import ViewSettings, ViewSpec, expand

RETINA = Path(skimage.data.__file__).parent / "retina.jpg"  # 1411 x 1411 pixels
NAMES = ("china", "flower", "hubble", "rocket", "astronaut", "coffee", "ihc", "motorcycle")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs of 400 to 1411 pixels, as cameras store them."""
    folder, full = tmp_path_factory.mktemp("large"), photographs()
    for place, name in enumerate(NAMES):
        quality, subsampling = ((95, 0), (88, 2))[place % 2]
        full[name].save(folder / f"{name}.jpg", quality=quality, subsampling=subsampling)
    (folder / "retina.jpg").write_bytes(RETINA.read_bytes())
    return sorted(folder.iterdir())


def views(global_size: int, local_size: int) -> tuple[ViewSpec, ...]:
    return ViewSettings(global_size=global_size, local_count=4, local_size=local_size).specs()


# ---------------------------------------------------------------------------------- when
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=4),
    st.integers(1, 256),
)
def test_no_view_ever_has_too_few_pixels(sides: list[tuple[int, int]], size: int) -> None:
    boxes = [(0, 0, height, width) for height, width in sides]
    factor = reduction(boxes, [size] * len(boxes))
    least = min(min(pair) for pair in sides)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or least / factor >= SPARE * size
    assert factor == 8 or least / (2 * factor) < SPARE * size  # and none larger would do


def test_one_view_that_would_be_enlarged_is_enough() -> None:
    large, small = (0, 0, 800, 800), (10, 10, 90, 80)
    assert reduction([large], [96]) == 4
    assert reduction([large, small], [96, 96]) == 1
    assert reduction([large, (0, 0, 800, 383)], [96, 96]) == 1


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from([2, 4, 8]), st.data())
def test_a_reduced_box_lies_in_the_reduced_image(
    height: int, width: int, factor: int, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top = data.draw(st.integers(0, height - rows))
    left = data.draw(st.integers(0, width - columns))
    small = -(-height // factor), -(-width // factor)  # libjpeg rounds up
    box = reduced_box((top, left, rows, columns), factor, *small)
    assert 0 <= box[0] <= small[0] - box[2]
    assert 0 <= box[1] <= small[1] - box[3]
    for place, full in zip(box, (top, left, rows, columns), strict=True):
        assert abs(factor * place - full) <= factor or place == 1


# ---------------------------------------------------------------------------------- how far off
def decoded(path: Path, factor: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """The file decoded at a factor, and its full size."""
    with open_image(path) as image:
        return as_pixels(image.decode(factor)), image.size


def test_views_are_those_of_the_full_image(jpegs: list[Path]) -> None:
    """Within 1.2 levels on average of every view, and 0.7 on average of all views."""
    differences: dict[int, list[float]] = {2: [], 4: [], 8: []}
    for index, path in enumerate(jpegs):
        full = as_pixels(read_image(path))
        for global_size, local_size in ((96, 36), (64, 24), (32, 12), (16, 6)):
            for epoch in range(3):
                specs = views(global_size, local_size)
                drawn = draw_views(specs, *full.shape[1:], generator(0, epoch, index))
                sizes = [spec.size for spec in expand(specs)]
                factor = reduction([view.box for view in drawn], sizes)
                if factor == 1:
                    continue
                small, _ = decoded(path, factor)
                shape = [-(-length // factor) for length in full.shape[1:]]
                assert list(small.shape[1:]) == shape
                for view, size in zip(drawn, sizes, strict=True):
                    box = reduced_box(view.box, factor, *small.shape[1:])
                    ours = crop_resize(small, box, size, False)
                    # Against the same pixels: full pixels of the smaller image.
                    top, left, height, width = (factor * length for length in box)
                    same = full[:, top : top + height, left : left + width]
                    theirs = crop_resize(same, (0, 0, *same.shape[1:]), size, False)
                    difference = (ours.int() - theirs.int()).abs().float().mean().item()
                    differences[factor].append(difference)
    assert all(len(found) >= 20 for found in differences.values())
    every = np.concatenate(list(differences.values()))
    assert every.max() <= 1.2
    assert every.mean() <= 0.7


def test_the_place_of_a_crop_moves_by_less_than_a_pixel_of_the_view(jpegs: list[Path]) -> None:
    """The box is that of the full image to half a reduced pixel, a quarter of one of the view."""
    for index in range(200):
        specs = views(32, 12)
        drawn = draw_views(specs, 900, 937, generator(1, 0, index))
        sizes = [spec.size for spec in expand(specs)]
        factor = reduction([view.box for view in drawn], sizes)
        small = [-(-length // factor) for length in (900, 937)]
        for view, size in zip(drawn, sizes, strict=True):
            box = reduced_box(view.box, factor, *small)
            for axis in (0, 1):
                pixel = view.box[axis + 2] / size  # of the view, in pixels of the image
                assert abs(factor * box[axis] - view.box[axis]) <= max(0.5, 0.5 * pixel)


# ---------------------------------------------------------------------------------- files
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_pixels_of_turned_jpegs_are_upright(orientation: int, tmp_path: Path) -> None:
    picture = photographs()["rocket"].resize((400, 272))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    upright = as_pixels(read_image(tmp_path / "a.jpg"))
    small, size = decoded(tmp_path / "a.jpg", 2)
    assert size == tuple(upright.shape[1:])
    assert small.shape == (3, upright.shape[1] // 2, upright.shape[2] // 2)
    averaged = torch.nn.functional.avg_pool2d(upright.float(), 2)
    assert (small - averaged).abs().mean() < 2


def test_only_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    picture = photographs()["rocket"].resize((400, 272))
    for name in ("a.png", "a.webp", "a.tif", "a.bmp"):
        picture.save(tmp_path / name)
        small, size = decoded(tmp_path / name, 8)
        assert (small.shape, size) == ((3, 272, 400), (272, 400))


def test_factor_one_decodes_the_full_image(jpegs: list[Path]) -> None:
    assert torch.equal(decoded(jpegs[0], 1)[0], as_pixels(read_image(jpegs[0])))


# ---------------------------------------------------------------------------------- sources
SPECS = views(48, 16)


def batches(data: object, workers: int = 0) -> list[Batch]:
    source = open_source(data)
    sampler = EpochSampler(len(source), 4, seed=3, stop_step=4)
    return list(PretrainLoader(source, SPECS, sampler, seed=3, workers=workers))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, two.index)
        for group, other in zip(one.groups, two.groups, strict=True):
            assert torch.equal(group.images, other.images)
            assert torch.equal(group.params, other.params)


def test_every_source_of_files_gives_the_same_views(
    jpegs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = batches(jpegs[0].parent)
    assert_equal(batches(jpegs[0].parent, workers=1), folder)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in jpegs))
    assert_equal(batches(tmp_path / "list.txt"), folder)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for path in jpegs:
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            shard.addfile(member, io.BytesIO(path.read_bytes()))
    assert_equal(batches(tmp_path / "a.tar"), folder)
    assert_equal(batches(tmp_path / "a.tar", workers=1), folder)


def test_a_source_that_decodes_full_images_gives_nearly_the_same(jpegs: list[Path]) -> None:
    full = batches([as_pixels(read_image(path)) for path in jpegs])
    differ = []
    for one, two in zip(batches(jpegs[0].parent), full, strict=True):
        assert torch.equal(one.index, two.index)
        for group, other in zip(one.groups, two.groups, strict=True):
            assert torch.equal(group.params, other.params)
            differ.append((group.images.int() - other.images.int()).abs().float().mean().item())
    assert max(differ) > 0  # so some of them were decoded smaller
    assert max(differ) < 4
