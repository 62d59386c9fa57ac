"""Every page of stacks as an image of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers.dicoms import dicom
from PIL import Image

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.files import UserError

DEPTH = np.random.default_rng(0).integers(0, 255, (3, 6, 7), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
    tifffile.imwrite(tmp_path / "a/0.tif", DEPTH, photometric="minisblack")
    dicom(tmp_path / "a/1.dcm", np.stack([DEPTH[0]] * 2))
    Image.fromarray(DEPTH[1]).save(tmp_path / "b/2.png")
    (tmp_path / "b/3.tif").write_bytes(b"II*\0 damaged")
    return tmp_path


def test_pages_and_frames_are_images(root: Path) -> None:
    source = open_source(f"{root}?pages=all", PixelFormat(1))
    names = [source.path(index).removeprefix(f"{root}/") for index in range(len(source))]
    assert names == [
        *("a/0.tif, page 0", "a/0.tif, page 1", "a/0.tif, page 2"),
        *("a/1.dcm, page 0", "a/1.dcm, page 1", "b/2.png", "b/3.tif"),
    ]
    assert (source.classes, source.labels) == (["a", "b"], [0] * 5 + [1] * 2)
    for page, expected in enumerate(DEPTH):
        assert np.array_equal(as_pixels(source[page])[0].numpy(), expected)
    assert np.array_equal(as_pixels(source[5])[0].numpy(), DEPTH[1])
    with pytest.raises(ImageError, match=r"b/3\.tif cannot be read"):
        source[6]
    assert source.digest() != open_source(root).digest()


def test_a_page_and_all_pages_contradict_each_other(root: Path) -> None:
    with pytest.raises(UserError, match="takes all pages: leave out --page 2"):
        open_source(f"{root}?pages=all", PixelFormat(1, 2))


def test_a_list_of_stacks(root: Path) -> None:
    (root / "list.txt").write_text("a/0.tif\nb/2.png\n")
    assert len(open_source(f"{root / 'list.txt'}?pages=all")) == 4
