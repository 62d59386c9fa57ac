"""Arrays of images, in memory and on the disk."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.sources.arrays import Arrays
from dino.data.sources.open import Source, open_source
from dino.files import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


@pytest.fixture(params=["memory", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def source(images: np.ndarray, kind: str, folder: Path) -> Source:
    if kind == "memory":
        return open_source(images)
    np.save(folder / "images.npy", images)
    return open_source(str(folder / "images.npy"))


def test_channels_last_first_and_none(kind: str, tmp_path: Path) -> None:
    expected = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)
    for images in (COLOUR, COLOUR.transpose(0, 3, 1, 2)):
        found = source(images, kind, tmp_path)
        assert isinstance(found, Source)
        assert (len(found), found.labels, found.classes) == (5, None, None)
        assert torch.equal(torch.stack([as_pixels(found[i]) for i in range(5)]), expected)
    grey = source(COLOUR[..., 0], kind, tmp_path)
    assert torch.equal(as_pixels(grey[2])[1], expected[2, 0])
    square = source(np.full((2, 3, 3, 3), 7, dtype=np.uint8), kind, tmp_path)
    assert as_pixels(square[0]).shape == (3, 3, 3)


def test_what_is_mapped_is_read_only_where_it_is_needed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR)
    found = Arrays(tmp_path / "a.npy")
    assert isinstance(found._images, np.memmap)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    image = as_pixels(pickle.loads(sent)[3])
    image += 1  # in separate memory
    assert torch.equal(as_pixels(found[3]) + 1, image)
    assert found.path(3) == f"image 3 of {tmp_path / 'a.npy'}"


def test_what_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    for shape in [(4,), (4, 4), (2, 2, 3, 4, 5)]:
        with pytest.raises(UserError, match=r"has shape \(.*images need \[N,H,W\]"):
            source(np.zeros(shape, dtype=np.uint8), kind, tmp_path)
    with pytest.raises(UserError, match=r"has shape \(0, 4, 4\): images need"):
        source(np.zeros((0, 4, 4), dtype=np.uint8), kind, tmp_path)
    with pytest.raises(ImageError, match=r"image 1 of .* it is a Tensor|image 1 of .* a ndarray"):
        source(np.zeros((2, 4, 4), dtype=np.complex64), kind, tmp_path)[1]


def test_the_digest_is_that_of_shape_and_values(kind: str, tmp_path: Path) -> None:
    digest = source(COLOUR, kind, tmp_path).digest()
    assert open_source(COLOUR.copy()).digest() == digest
    other = COLOUR.copy()
    other[4] = 0
    assert len({source(images, kind, tmp_path).digest() for images in (COLOUR, other)}) == 2
    assert source(COLOUR[:4], kind, tmp_path).digest() != digest


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.npy does not exist"):
        open_source(tmp_path / "no.npy")
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"a\.npy cannot be read as a \.npy array"):
        open_source(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(UserError, match=r"b\.npy cannot be read as a \.npy array"):
        open_source(tmp_path / "b.npy")


def test_a_zip_archive_is_refused_without_reading_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of a million records takes 17 seconds and 500 MB."""
    np.savez(tmp_path / "a.npz", COLOUR)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_, **__: pytest.fail("it is read"))
    with pytest.raises(UserError, match=r"a\.npy cannot be read as a \.npy array"):
        open_source(tmp_path / "a.npy")
