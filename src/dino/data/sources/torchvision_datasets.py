"""The data sets of torchvision for classification: `torchvision:CIFAR10?split=train`."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from dino.data.images.image_errors import ImageError
from dino.data.sources.base import split_settings
from dino.data.sources.torch_dataset import TorchDataset
from dino.files import UserError, cache_folder

FORM = "torchvision:NAME?root=DIR&split=SPLIT&download=1"

NAMES = (
    *("CIFAR10", "CIFAR100", "CLEVRClassification", "Caltech101", "Caltech256", "Country211"),
    *("DTD", "EuroSAT", "FER2013", "FGVCAircraft", "FashionMNIST", "Flowers102", "Food101"),
    *("GTSRB", "ImageNet", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet", "PCAM", "Places365"),
    *("RenderedSST2", "SEMEION", "STL10", "SUN397", "SVHN", "StanfordCars", "USPS"),
)
"""Data sets of single images, each of one class."""

# Where torchvision keeps the labels, or the pairs of an image and its label.
_LABELS, _PAIRS = ("targets", "labels", "_labels", "y"), "_samples"


class TorchvisionDataset(TorchDataset):
    """A data set of torchvision's.

    Args:
        data: NAME and settings, as in `FORM` without its beginning. The split is one of those of
            the data set; where torchvision has a training and a test part only, "train" or "test".
            By default it is torchvision's default. The root is the folder where torchvision
            looks for the files, by default `torchvision` in the cache folder.

    Raises:
        UserError: for an unknown name, split or setting, or if the files are not there.
    """

    def __init__(self, data: str) -> None:
        name, settings = split_settings(data, FORM, "torchvision's data sets")
        opened = _open(name, settings)
        self.name = f"torchvision:{name}"
        super().__init__(opened, _labels_of(opened))

    def content(self, index: int) -> Any:
        """The item; raises `ImageError` if its file is missing or damaged."""
        try:
            return super().content(index)
        except (OSError, SyntaxError) as error:  # of Pillow, which torchvision reads files with
            missing = isinstance(error, FileNotFoundError)
            raise ImageError(
                self.path(index), str(error), "missing" if missing else "damaged"
            ) from error

    def path(self, index: int) -> str:
        """The image's place in the data set."""
        return f"image {index} of {self.name}"

    def identity(self) -> list[bytes]:
        """The name of the data set, and what `TorchDataset` covers."""
        return [self.name.encode(), *super().identity()]


def _open(name: str, settings: dict[str, str]) -> Any:
    from torchvision import datasets

    if name not in NAMES or not hasattr(datasets, name):
        near = get_close_matches(name.lower(), [known.lower() for known in NAMES], n=3)
        alike = [known for known in NAMES if known.lower() in near]
        raise UserError(
            f"torchvision has no data set of classes called {name!r}: "
            + (f"did you mean {' or '.join(alike)}?" if alike else f"it has {', '.join(NAMES)}")
        )
    make = getattr(datasets, name)
    takes = inspect.signature(make).parameters
    root = settings.get("root") or str(cache_folder() / "torchvision")
    options: dict[str, Any] = {"root": root}
    if (split := settings.get("split")) is not None:
        options |= _chosen(name, split, takes)
    if settings.get("download", "0") not in ("0", "1"):
        raise UserError("download is 1 to fetch the files, or 0")
    if settings.get("download") == "1":
        if "download" not in takes:
            raise UserError(f"torchvision does not fetch {name}: put its files into {root}")
        options["download"] = True
    try:
        return make(**options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        advice = "" if "download" in options else "; fetch it with &download=1, or give &root=DIR"
        reason = " ".join(str(error).split())
        raise UserError(f"torchvision cannot open {name} in {root}: {reason}{advice}") from error


def _chosen(name: str, split: str, takes: Any) -> dict[str, Any]:
    """The argument of torchvision's that stands for a split."""
    if "split" in takes:
        return {"split": split}
    if "train" not in takes:
        raise UserError(f"{name} has no splits: leave out split={split}")
    if split not in ("train", "test"):
        raise UserError(f"{name} has the splits train and test, not {split!r}")
    return {"train": split == "train"}


def _labels_of(data: Any) -> Any:
    """The label of each image, if torchvision keeps them all at hand."""
    found = [getattr(data, name) for name in _LABELS if getattr(data, name, None) is not None]
    pairs = getattr(data, _PAIRS, None)
    return found[0] if found else None if pairs is None else [label for _, label in pairs]
