"""Data sets of torchvision, from tiny files in its formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source, open_source
from dino.data.sources.torchvision_datasets import NAMES
from dino.files import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, pixels in (("train", PIXELS), ("t10k", PIXELS[:2])):
        header = struct.pack(">iiii", 2051, len(pixels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(index % 10 for index in range(len(pixels)))
        header = struct.pack(">ii", 2049, len(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)
    return tmp_path


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    base = tmp_path / "dtd" / "dtd"
    for name in ("dots/dots_1.jpg", "lines/lines_1.jpg"):
        (base / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (5, 4), "red").save(base / "images" / name)
    (base / "labels").mkdir()
    (base / "labels" / "train1.txt").write_text("lines/lines_1.jpg\ndots/dots_1.jpg\n")
    (base / "labels" / "val1.txt").write_text("dots/dots_1.jpg\n")
    return tmp_path


def test_training_and_test_part(mnist: Path) -> None:
    source = open_source(f"torchvision:FashionMNIST?root={mnist}")
    assert isinstance(source, Source)
    assert source.labels == [0, 1, 2, 3, 4, 5]
    assert source.classes is not None
    assert source.classes[9] == "Ankle boot"
    assert as_pixels(source[3])[1].numpy().tolist() == PIXELS[3].tolist()
    assert source.path(3) == "image 3 of torchvision:FashionMNIST"
    assert len(open_source(f"torchvision:FashionMNIST?root={mnist}&split=train")) == 6
    assert len(open_source(f"torchvision:FashionMNIST?root={mnist}&split=test")) == 2
    with pytest.raises(UserError, match="FashionMNIST has the splits train and test, not 'val'"):
        open_source(f"torchvision:FashionMNIST?root={mnist}&split=val")


def test_splits_and_labels_under_another_name(textures: Path) -> None:
    source = open_source(f"torchvision:DTD?root={textures}&split=train")
    assert (source.labels, source.classes) == ([1, 0], ["dots", "lines"])
    assert len(open_source(f"torchvision:DTD?root={textures}&split=val")) == 1
    with pytest.raises(UserError, match=r"cannot open DTD in .*Valid values"):
        open_source(f"torchvision:DTD?root={textures}&split=valid")


def test_files_that_are_damaged_or_gone(textures: Path) -> None:
    source = open_source(f"torchvision:DTD?root={textures}")
    image = textures / "dtd" / "dtd" / "images" / "dots" / "dots_1.jpg"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(ImageError, match="image 1 of torchvision:DTD") as caught:
        source[1]
    assert caught.value.defect == "damaged"
    image.unlink()
    with pytest.raises(ImageError, match="image 1 of torchvision:DTD") as caught:
        source[1]
    assert caught.value.defect == "missing"


def test_by_default_they_lie_in_the_cache_folder(cache: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open CIFAR10 in .*: .*&download=1") as caught:
        open_source("torchvision:CIFAR10")
    assert str(cache / "torchvision") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"called '': it has CIFAR10"):
        open_source("torchvision:")
    with pytest.raises(UserError, match=r"called 'zzz': it has CIFAR10, CIFAR100"):
        open_source("torchvision:zzz")
    with pytest.raises(UserError, match="'spilt' is no setting of torchvision's data sets"):
        open_source("torchvision:CIFAR10?spilt=train")
    with pytest.raises(UserError, match="download is 1 to fetch the files, or 0"):
        open_source("torchvision:CIFAR10?download=yes")
    with pytest.raises(UserError, match="torchvision does not fetch ImageNet: put its files into"):
        open_source(f"torchvision:ImageNet?root={tmp_path}&download=1")
    with pytest.raises(UserError, match="EuroSAT has no splits: leave out split=train"):
        open_source(f"torchvision:EuroSAT?root={tmp_path}&split=train")


def test_torchvision_has_all_of_them() -> None:
    from torchvision import datasets

    assert [name for name in NAMES if not hasattr(datasets, name)] == []
