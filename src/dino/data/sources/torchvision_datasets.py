"""The data sets of torchvision for classification: `torchvision:CIFAR10?split=train`."""

from __future__ import annotations

import inspect
from typing import Any

from dino.data.sources.base import image_errors, split_settings
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

# Where torchvision stores the labels, or the pairs of an image and its label.
_LABELS, _PAIRS = ("targets", "labels", "_labels", "y"), "_samples"


class TorchvisionDataset(TorchDataset):
    """A data set of torchvision's.

    Args:
        data: NAME and settings, as in `FORM` without its beginning. The split is one of the data
            set, or "train" or "test" where it has only these; by default torchvision's default. The
            root is the folder of the files, by default `torchvision` in the cache folder.

    Raises:
        UserError: for an unknown name, split or setting, or if the files are not there.
    """

    def __init__(self, data: str) -> None:
        name, settings = split_settings(data, FORM, "torchvision's data sets")
        self.name = f"torchvision:{name}"
        dataset = _open(name, settings)
        labels = [found for key in _LABELS if (found := getattr(dataset, key, None)) is not None]
        if not labels and (pairs := getattr(dataset, _PAIRS, None)) is not None:
            labels = [[label for _, label in pairs]]
        super().__init__(dataset, labels[0] if labels else None)

    def content(self, index: int) -> Any:
        """The item; raises `ImageError` if its file is missing or damaged."""
        with image_errors(self.path(index), "damaged"):
            return super().content(index)

    def path(self, index: int) -> str:
        """The image's index in the data set."""
        return f"image {index} of {self.name}"

    def identity(self) -> list[bytes]:
        """The name of the data set, and the content of `TorchDataset.identity`."""
        return [self.name.encode(), *super().identity()]


def _open(name: str, settings: dict[str, str]) -> Any:
    from torchvision import datasets

    if name not in NAMES or not hasattr(datasets, name):
        raise UserError(
            f"torchvision has no data set of classes called {name!r}: it has {', '.join(NAMES)}"
        )
    dataset = getattr(datasets, name)
    parameters = inspect.signature(dataset).parameters
    split, download = settings.get("split"), settings.get("download", "0")
    root = settings.get("root") or str(cache_folder() / "torchvision")
    options: dict[str, Any] = {"root": root}
    if split is not None and "split" in parameters:
        options["split"] = split
    elif split is not None and "train" not in parameters:
        raise UserError(f"{name} has no splits: leave out split={split}")
    elif split not in (None, "train", "test"):
        raise UserError(f"{name} has the splits train and test, not {split!r}")
    elif split is not None:
        options["train"] = split == "train"
    if download not in ("0", "1"):
        raise UserError("download is 1 to fetch the files, or 0")
    if download == "1":
        if "download" not in parameters:
            raise UserError(f"torchvision does not fetch {name}: put its files into {root}")
        options["download"] = True
    try:
        return dataset(**options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        advice = "" if download == "1" else "; fetch it with &download=1, or give &root=DIR"
        reason = " ".join(str(error).split())
        raise UserError(f"torchvision cannot open {name} in {root}: {reason}{advice}") from error
