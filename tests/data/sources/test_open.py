from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.sources.base import number_classes
from dino.data.sources.open import Folder, Source, open_source
from dino.data.sources.packed_strings import PackedStrings
from dino.files import UserError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (len(name), 0, 0)).save(path)
    return root


# ---------------------------------------------------------------------------------- folders
def test_a_flat_folder_in_sorted_order(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "b.png", "a.jpg", "C.PNG", "d.JPEG", "e.TIFF", "f.webp"))
    names = [Path(source.path(index)).name for index in range(len(source))]
    assert names == ["C.PNG", "a.jpg", "b.png", "d.JPEG", "e.TIFF", "f.webp"]
    assert (source.labels, source.classes) == (None, None)
    assert source[2].size == (6, 4)


def test_sub_folders_of_the_first_level_are_the_classes(tmp_path: Path) -> None:
    make(tmp_path, "dog/x/2.png", "dog/1.png", "cat/1.png", "emu/deep/er/1.png")
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog", "emu"]
    assert source.labels == [0, 1, 1, 2]


def test_one_image_outside_or_one_class_alone_gives_no_labels(tmp_path: Path) -> None:
    assert open_source(make(tmp_path / "a", "dog/1.png", "cat/1.png", "1.png")).labels is None
    assert open_source(make(tmp_path / "b", "images/1.png", "images/2.png")).labels is None


def test_hidden_and_foreign_files_are_skipped(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "._a.png", ".cache/b.png")
    (tmp_path / "labels.csv").write_text("x")
    assert len(open_source(tmp_path)) == 1


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "1.png")
    make(tmp_path / "data", "a/1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    assert len(open_source(tmp_path / "data")) == 2


def test_names_of_any_bytes(tmp_path: Path) -> None:
    try:
        make(tmp_path, "ä/Ω 1.png", os.fsdecode(b"\xff.png"))
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    source = open_source(tmp_path)
    assert [source[index].size for index in range(2)] == [(6, 4), (6, 4)]


def test_a_folder_pickles_small(tmp_path: Path) -> None:
    source = Folder(make(tmp_path, "a/1.png", "b/2.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.path(1), copy.labels) == (source.path(1), [0, 1])


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist: give --data a folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(UserError, match="empty is empty: give --data a folder"):
        open_source(tmp_path / "empty")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("1.txt", "2.TXT", "3.txt", "a.csv", "README", ".hidden"):
        (texts / name).write_text("x")
    with pytest.raises(UserError, match=r"no images: found 3 \.txt, 1 \.csv, 1 without extension"):
        open_source(texts)
    with pytest.raises(UserError, match="README is a file: give --data a folder"):
        open_source(texts / "README")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(UserError, match="a cannot be read: Permission denied"):
            open_source(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o700)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "a.png", "b.png"))
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png cannot be read as an image: there is no such"):
        source[1]


def test_names_are_a_sequence_of_strings() -> None:
    strings = ["a", "", "ä/b.png", "c" * 300]
    names = PackedStrings(strings)
    assert list(names) == strings
    assert names[-1] == strings[-1]
    with pytest.raises(IndexError):
        names[4]
    assert list(PackedStrings([])) == []


def test_names_are_joined_and_divided() -> None:
    parts = [["a", "é"], [], ["", "c" * 300]]
    joined = PackedStrings.joined([PackedStrings(part) for part in parts])
    assert list(joined) == [name for part in parts for name in part]
    assert list(PackedStrings.of(joined.text, joined.ends)) == list(joined)


def test_classes_are_numbered_in_their_order() -> None:
    assert number_classes(["b", "a", "b"]) == (["a", "b"], [1, 0, 1])
    assert number_classes(["10", "9", "-1"]) == (["-1", "9", "10"], [2, 1, 0])
    assert number_classes(["10", "9", "x"]) == (["10", "9", "x"], [0, 1, 2])


# ---------------------------------------------------------------------------------- objects
class Pictures(Dataset):
    """A user's data set."""

    def __init__(self, samples: list, **attributes: object) -> None:
        self.samples = samples
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        return self.samples[index]


GREY = Image.new("L", (6, 4), 9)


def test_a_data_set_of_images_with_and_without_labels() -> None:
    source = open_source(Pictures([GREY, (GREY, 1), np.zeros((4, 6, 3), dtype=np.uint8)]))
    assert isinstance(source, Source)
    assert len(source) == 3
    assert (source[0].mode, source[1].size, tuple(source[2].shape)) == ("RGB", (6, 4), (3, 4, 6))
    assert (source.labels, source.classes) == (None, None)
    assert source.path(1) == "item 1 of the Pictures"


def test_targets_are_labels_also_through_a_subset() -> None:
    for targets in ([0, 1, 1, 0], np.array([0, 1, 1, 0]), torch.tensor([0, 1, 1, 0])):
        data = Pictures([GREY] * 4, targets=targets, classes=["cat", "dog"])
        source = open_source(data)
        assert (source.labels, source.classes) == ([0, 1, 1, 0], ["cat", "dog"])
        part = open_source(Subset(Subset(data, [3, 1, 0]), [1, 2]))
        assert (part.labels, part.classes) == ([1, 0], ["cat", "dog"])
    unnamed = open_source(Pictures([GREY] * 2, targets=[0, 2]))
    assert unnamed.classes == ["0", "1", "2"]


def test_targets_that_are_no_classes_are_ignored() -> None:
    for targets in (["a", "b"], [0.5, 1.0], [[0], [1, 2]], [1], [-1, 0], None):
        assert open_source(Pictures([GREY] * 2, targets=targets)).labels is None


def test_a_list_of_pairs_has_labels_and_a_list_of_images_none() -> None:
    assert open_source([(GREY, 1), (GREY, 0)]).labels == [1, 0]
    assert open_source([(GREY, "cat"), (GREY, "dog")]).labels is None
    assert open_source([GREY, GREY]).labels is None


def test_files_of_a_data_set_are_named(tmp_path: Path) -> None:
    make(tmp_path / "data", "a/1.png", "b/2.png")
    data = ImageFolder(tmp_path / "data")
    source, part = open_source(data), open_source(Subset(data, [1]))
    assert source.path(1) == part.path(0) == str(tmp_path / "data" / "b" / "2.png")
    digest = source.digest()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_source(ImageFolder(tmp_path / "moved")).digest() == digest
    (tmp_path / "moved" / "b" / "2.png").rename(tmp_path / "moved" / "b" / "3.png")
    assert open_source(ImageFolder(tmp_path / "moved")).digest() != digest
    named = Pictures([GREY], path=lambda index: f"slide {index}")
    assert open_source(named).path(0) == "slide 0"


def test_the_digest_of_data_sets() -> None:
    other = Image.new("L", (6, 4), 10)
    items = ([GREY], [other], [GREY, GREY], [(GREY, 1)], torch.zeros(1, 4, 4), torch.ones(1, 4, 4))
    digests = [open_source(data).digest() for data in items]
    assert len(set(digests)) == len(items)
    assert open_source([GREY.copy()]).digest() == digests[0]

    class Unread(Pictures):
        def __getitem__(self, index: int) -> object:
            raise AssertionError("a file would be opened before the workers start")

    assert open_source(Unread([GREY])).digest() == open_source(Unread([other])).digest()
    with_labels = open_source(Unread([GREY], targets=[0])).digest()
    assert with_labels != open_source(Unread([GREY])).digest()


def test_every_source_has_the_entire_protocol(tmp_path: Path) -> None:
    for data in (make(tmp_path, "a.png"), [GREY], np.zeros((1, 4, 4), np.uint8), "demo:test"):
        source = open_source(data)
        assert isinstance(source, Source)
        assert (dict(source.left_out), source.blocks) == ({}, None)
        with source.open(0) as image:
            assert as_pixels(image.decode()).equal(as_pixels(source[0]))
            assert image.values().ndim == 3


def test_a_tensor_of_images_is_a_data_set() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    for data in (images, TensorDataset(images)):
        assert torch.equal(open_source(data)[1], images[1])


def test_a_source_stays_what_it_is(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "a.png"))
    assert open_source(source) is source


def test_what_is_no_data_set() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Image.Image]:
            return iter([GREY])

    class Sized(Stream):
        def __len__(self) -> int:
            return 1

    for data in (Stream(), Sized(), 7, None, {1}, (image for image in [GREY]), b"bytes"):
        with pytest.raises(UserError, match=r"cannot take images from a .*: give a folder"):
            open_source(data)
    for words, data in {
        r"'test', 'train': .* data\['train'\]": {"test": [GREY], "train": [GREY]},
        r"'label', 'img': .* data\['img'\]": {"label": [1], "img": [GREY]},
        "nothing: give the images": {},
    }.items():
        with pytest.raises(UserError, match=f"from a dict of {words}"):
            open_source(data)
    with pytest.raises(UserError, match="the Tensor given as data has no length: "):
        open_source(torch.tensor(3))
    with pytest.raises(UserError, match="the list given as data is empty"):
        open_source([])
    with pytest.raises(ImageError, match="item 0 of the list"):
        open_source([torch.rand(3, 4, 4)])[0]
