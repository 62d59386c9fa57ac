"""Images with masks of their objects on disk: as in PASCAL VOC, or in two folders.

    VOC      JPEGImages, SegmentationClass or SegmentationObject, ImageSets/Segmentation/val.txt
    plain    images, masks (same names but for the ending); optional lists train.txt, val.txt

Shapes: H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.images.image_errors import ImageError
from dino.data.images.masks import Ids, read_mask
from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.base import warn
from dino.data.sources.folder import warn_left_out
from dino.files import UserError

Objects = Literal["class", "instance"]

FOLDERS: dict[Objects, str] = {"class": "SegmentationClass", "instance": "SegmentationObject"}


class Scene(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path

    def read(self) -> tuple[Image.Image, Ids]:
        """The RGB picture and the mask.

        Raises:
            UserError: naming the file that cannot be read, or a mask of another size.
        """
        try:
            picture = read_picture(self.image)
        except ImageError as error:  # without the image the mean would be another measure
            raise UserError(f"{error}; repair it or remove it from the data") from None
        ids = read_mask(self.mask).ids
        if ids.shape != (picture.height, picture.width):
            raise UserError(
                f"the mask {self.mask} is {ids.shape[1]} x {ids.shape[0]} pixels, but its "
                f"image {self.image} {picture.width} x {picture.height}: make their sizes equal"
            )
        return picture, ids


def has_masks(data: str | Path) -> bool:
    """Whether images are a folder in one of the two layouts."""
    layouts = (("images", "masks"), ("JPEGImages", FOLDERS["class"]))
    return any(all((Path(data) / name).is_dir() for name in names) for names in layouts)


def scored_scenes(root: Path, split: str, objects: Objects = "class") -> list[Scene]:
    """The scenes of a split; of images and masks without such a list, all scenes.

    Raises:
        UserError: see `open_scenes`.
    """
    listed = is_voc(root) or list_file(root, split).is_file()
    return open_scenes(root, split if listed else None, objects)


def list_file(root: Path, split: str) -> Path:
    """The list of a split's scenes."""
    return root / ("ImageSets/Segmentation" if is_voc(root) else "") / f"{split}.txt"


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


def open_scenes(root: Path, split: str | None, objects: Objects = "class") -> list[Scene]:
    """The scenes of a split.

    Args:
        root: a folder in one of the two layouts.
        split: name of a list of scenes, without .txt; None for all scenes.
        objects: masks of VOC with a number for each class, or for each instance.

    Raises:
        UserError: naming the folder, list, image or mask that is missing.
    """
    names = ("JPEGImages", FOLDERS[objects]) if is_voc(root) else ("images", "masks")
    images, masks = (files_by_stem(root / name, EXTENSIONS) for name in names)
    stems: Sequence[str] = list(images)
    if split is not None:
        stems = read_list(list_file(root, split), "choose another with --split or --train-split")
    for stem in stems:
        for kind, name, found in zip(("image", "mask"), names, (images, masks), strict=True):
            if stem not in found:
                raise UserError(f"there is no {kind} {stem} in {root / name}")
    if split is None and (extra := len(masks.keys() - images.keys())):
        warn(f"{root}: {extra:,} of {len(masks):,} masks are left out, having no image")
    return [Scene(images[stem], masks[stem]) for stem in stems]


def read_list(path: Path, advice: str) -> list[str]:
    """Names, one a line.

    Raises:
        UserError: with `advice` if the file is missing, or if it is empty.
    """
    if not path.is_file():
        raise UserError(f"the list {path} is missing: {advice}")
    lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"the list {path} is empty")
    return names


def files_by_stem(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files with one of these endings by their names without it, in the order of their names.

    One sentence on stderr counts the files with other endings; hidden files do not count.

    Raises:
        UserError: if the folder is missing, holds no such file, or two that differ by the ending.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} is missing")
    found: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
        if path.suffix.lower() not in endings:
            others[path.suffix.lower()] += path.is_file()
        elif path.stem in found:
            raise UserError(f"{found[path.stem]} and {path} have the same name: rename one of them")
        else:
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder} holds no files that end in {' '.join(endings)}")
    warn_left_out(
        str(folder), +others, f"files that end in {endings[0]}" if len(endings) == 1 else "images"
    )
    return found
