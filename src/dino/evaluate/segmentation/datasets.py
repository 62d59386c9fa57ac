"""Images with masks of their objects on disk: as in PASCAL VOC, or in two folders.

    VOC      JPEGImages, SegmentationClass or SegmentationObject, ImageSets/Segmentation/val.txt
    plain    images, masks (same names but for the ending); optional lists train.txt, val.txt

Shapes: H W pixels, h w patches, K kinds of objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dino.data.images.decode import read_picture, to_tensor
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS
from dino.data.views.photometric import normalize
from dino.evaluate.masks import VOID, Ids, read_mask
from dino.files import UserError
from dino.models.backbone import Backbone

Objects = Literal["class", "instance"]

FOLDERS: dict[Objects, str] = {"class": "SegmentationClass", "instance": "SegmentationObject"}


@dataclass(frozen=True)
class Scenes:
    """Images and their masks, pair by pair."""

    images: list[Path]
    masks: list[Path]

    def __len__(self) -> int:
        return len(self.images)

    def pixels_and_ids(self, index: int) -> tuple[Image.Image, Ids]:
        """Image `index` and its mask.

        Raises:
            UserError: naming the file that cannot be read, or a mask of another size.
        """
        try:
            picture = read_picture(self.images[index])
        except ImageError as error:  # without it the mean would be another measure
            raise UserError(f"{error}; repair it or remove it from the data") from None
        ids = read_mask(self.masks[index]).ids
        if ids.shape != (picture.height, picture.width):
            raise UserError(
                f"the mask {self.masks[index]} is {ids.shape[1]} x {ids.shape[0]} pixels, but its "
                f"image {self.images[index]} {picture.width} x {picture.height}: "
                "make their sizes equal"
            )
        return picture, ids

    def some(self, indices: Sequence[int]) -> Scenes:
        """The scenes at `indices`."""
        return Scenes([self.images[i] for i in indices], [self.masks[i] for i in indices])


def is_voc(root: Path) -> bool:
    """Whether a folder is laid out like PASCAL VOC.

    Raises:
        UserError: if its layout is unknown.
    """
    if (root / "JPEGImages").is_dir():
        return True
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return False
    raise UserError(
        f"{root} holds neither images and masks nor, as PASCAL VOC does, JPEGImages and "
        "SegmentationClass: give --data one of these"
    )


def open_scenes(root: str | Path, split: str | None, objects: Objects = "class") -> Scenes:
    """The scenes of a split.

    Args:
        root: a folder in one of the two layouts.
        split: name of a list of scenes, without .txt; in the plain layout None for all scenes.
        objects: masks of VOC with a number for each class, or for each instance.

    Raises:
        UserError: naming the folder, list, image or mask that is missing.
    """
    root = Path(root)
    if is_voc(root):
        images, masks = root / "JPEGImages", root / FOLDERS[objects]
        stems = read_list(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    else:
        images, masks = root / "images", root / "masks"
        stems = sorted(_by_stem(images)) if split is None else read_list(root / f"{split}.txt")
    pictures, numbered = _by_stem(images), _by_stem(masks)
    for stem in stems:
        for folder, found in ((images, pictures), (masks, numbered)):
            if stem not in found:
                kind = "image" if folder == images else "mask"
                raise UserError(f"there is no {kind} {stem} in {folder}")
    return Scenes([pictures[stem] for stem in stems], [numbered[stem] for stem in stems])


def read_list(path: Path) -> list[str]:
    """Names, one a line, without endings.

    Raises:
        UserError: if the file is missing or empty.
    """
    if not path.is_file():
        raise UserError(f"the list {path} is missing: choose another with --split or --train-split")
    stems = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not stems:
        raise UserError(f"the list {path} is empty")
    return stems


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"the folder {folder} is missing")
    files = (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    found: dict[str, Path] = {}
    for path in sorted(files):
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path} have the same name: rename one of them")
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder} holds no images")
    return found


# ------------------------------------------------------------------------------ to the network
def prepared(
    picture: Image.Image, backbone: Backbone, size: int, keep_aspect: bool
) -> Float[Tensor, "1 3 H W"]:
    """An image as a network's input: resized to complete patches and normalised, nothing cut off.

    Args:
        picture: RGB.
        backbone: gives patch size and normalisation.
        size: of the square in pixels, or of the shorter side.
        keep_aspect: keep the ratio of the sides (to the nearest patch), rather than make a square.
            The paper shows attention on squares.

    Raises:
        UserError: if no patch fits.
    """
    patch = backbone.patch_size or 1
    if size < patch:
        raise UserError(f"--size {size} holds no patch of {patch} px")
    shorter = min(picture.size) if keep_aspect else None
    width, height = (
        max(1, round(size * (side / shorter if shorter else 1) / patch)) * patch
        for side in picture.size
    )
    pixels = to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR))
    transform = backbone.preprocessing
    device = next(backbone.parameters()).device
    return normalize(pixels.to(device), transform.mean, transform.std)[None]


def patch_counts(
    ids: Ids, grid: tuple[int, int], numbers: Sequence[int]
) -> Int[Tensor, "{len(numbers)+1} {grid[0]} {grid[1]}"]:
    """How many pixels of each kind lie in each patch; the last row counts those of all others.

    A pixel lies in the patch that holds its upper left corner when the grid covers the image: the
    patch whose value it gets when the grid is enlarged by nearest neighbours.

    Args:
        ids: a mask; void counts nowhere.
        grid: height and width in patches.
        numbers: the kinds.
    """
    height, width = ids.shape
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    kind = np.full(256, len(numbers))
    kind[list(numbers)] = range(len(numbers))
    place = (kind[ids] * grid[0] + rows[:, None]) * grid[1] + columns
    total = (len(numbers) + 1) * grid[0] * grid[1]
    counts = np.bincount(place[ids != VOID], minlength=total)
    return torch.from_numpy(counts).view(len(numbers) + 1, *grid)
