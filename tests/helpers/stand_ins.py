"""Small stand-ins for all images and weights that the documentation names, under those names."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import tifffile
import torch
from helpers.dicoms import dicom
from helpers.pictures import write_plain, write_voc
from helpers.videos import write_davis, write_video
from PIL import Image

from dino.models.create import create
from dino.weights.load import save

CLASSES = ("cat", "dog")
TRAIN, VAL = 10, 3
"""Images of each class."""

_seeds = itertools.count()


def write_all(root: Path) -> None:
    """Everything that the documented commands read, and that none of them writes."""
    for name, count in {
        "photos": 16,
        "photos-full": 16,
        "drawings": 8,
        "others": 2,
        "normal": 4,
        "real": 40,
        "generated": 40,
        "yfcc10k": 4,
        "yfcc20k": 16,
    }.items():
        _images(root / name, [f"{index:02}.jpg" for index in range(count)])
    _images(root, ["a.jpg", "b.jpg"])
    _masks_and_clicks(root)
    write_video(root / "clip.mp4", [Image.fromarray(_noise(40, 48, 3)) for _ in range(3)])
    for name in ("labelled", "imagenet", "flowers", "imagenette-128"):
        for split, count in {"train": TRAIN, "val": VAL}.items():
            for kind in CLASSES:
                names = [f"{index:02}.jpg" for index in range(count)]
                _images(root / name / split / kind, names)
    for name, count in {"1percent.txt": 1, "10percent.txt": 2}.items():
        lines = [f"{kind}/{index:02}.jpg\n" for kind in CLASSES for index in range(count)]
        (root / name).write_text("".join(lines))
    _many_channels(root / "tiles", channels=9, count=8)
    _scientific(root, count=8)
    for name in ("datasets/roxford5k", "datasets/rparis6k", "mini-oxford"):
        _buildings(root / name)
    _images(root / "copydays/original", ["200000.jpg", "200100.jpg"])
    _images(root / "copydays/strong", ["200001.jpg", "200101.jpg"])
    write_voc(root / "VOCdevkit/VOC2012")
    for name in ("cells", "ecssd-200"):
        write_plain(root / name)
    for name in ("DAVIS", "davis-4", "my_videos"):
        write_davis(root / name, {"zebrafish": [1, 2]}, frames=3)
    _weights(root)


def _weights(root: Path) -> None:
    """`W` and `SUPERVISED`, and a linear layer as the published ones, for the features of `W`."""
    for name in ("W", "SUPERVISED"):
        network = create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=16, image_size=32)
        save(network, root / name)
    layer = {"linear.weight": torch.randn(len(CLASSES), 48), "linear.bias": torch.zeros(2)}
    published = {f"module.{name}": tensor for name, tensor in layer.items()}
    torch.save({"state_dict": published}, root / "dino_vitbase8_linearweights.pth")


def _noise(*shape: int) -> np.ndarray:
    generator = np.random.default_rng(next(_seeds))
    return generator.integers(0, 256, shape, dtype=np.uint8)


def _images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(_noise(40, 48, 3)).save(folder / name)


def _masks_and_clicks(root: Path) -> None:
    """Of the first two photographs."""
    (root / "some-masks").mkdir()
    for index in range(2):
        ids = (np.indices((40, 48))[index] > 16).astype(np.uint8)
        Image.fromarray(ids).save(root / f"some-masks/{index:02}.png")
    (root / "clicks.csv").write_text("image,x,y,class\n00.jpg,3,4,0\n01.jpg,40,30,1\n")


def _many_channels(folder: Path, channels: int, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        np.save(folder / f"{index}.npy", _noise(40, 48, channels).astype(np.uint16) * 100)


def _scientific(root: Path, count: int) -> None:
    """Five channels as pages of an OME-TIFF, four bands with a margin without data, and DICOMs."""
    for name in ("microscopy", "satellites", "medicine"):
        (root / name).mkdir()
    for index in range(count):
        deep = _noise(5, 40, 48).astype(np.uint16) * 16
        path = root / f"microscopy/{index}.ome.tif"
        tifffile.imwrite(path, deep, photometric="minisblack", metadata={"axes": "CYX"})
        bands = np.moveaxis(deep[:4].astype(np.int16), 0, 2)
        bands[:4] = -32768
        tags = [(42113, "s", 0, "-32768", True)]
        path = root / f"satellites/{index}.tif"
        tifffile.imwrite(path, bands, photometric="rgb", extratags=tags, metadata=None)
        dicom(root / f"medicine/IM{index:04}", deep[0], RescaleIntercept=-1024, RescaleSlope=1)
    (root / "stacks").mkdir()
    tifffile.imwrite(root / "stacks/0.tif", deep, photometric="minisblack")


def _buildings(root: Path) -> None:
    """A folder like Revisited Oxford: three images, of which each query shows one or two."""
    images, queries = ["all_souls_0", "all_souls_1", "ashmolean_0"], ["all_souls_2", "ashmolean_1"]
    _images(root / "jpg", [f"{name}.jpg" for name in images + queries])
    truth = [
        {"easy": [0], "hard": [1], "junk": [], "bbx": [4.0, 4.0, 44.0, 36.0]},
        {"easy": [2], "hard": [], "junk": [1], "bbx": [0.0, 0.0, 30.0, 30.0]},
    ]
    content = pickle.dumps({"imlist": images, "qimlist": queries, "gnd": truth})
    (root / f"gnd_{root.name}.pkl").write_bytes(content)
