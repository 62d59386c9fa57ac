"""Masks of objects in files: indexed or grey images whose values are numbers of objects.

Shapes: H W pixels.
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dino.data.images.png import save_picture
from dino.files import UserError

VOID = 255
"""Pixels that are excluded: they count neither as right nor as wrong."""

Ids = UInt8[np.ndarray, "H W"]


@dataclass(frozen=True)
class Mask:
    """Which object, or class, each pixel belongs to.

    Attributes:
        ids: 0 for the background, `VOID`, else the number of an object.
        palette: red, green and blue of each number in turn; None for a grey image.
        white: in the file object 1 is 255, white (there is no other object and no void).
    """

    ids: Ids
    palette: tuple[int, ...] | None = None
    white: bool = False

    @property
    def objects(self) -> list[int]:
        """The numbers of the objects, ascending."""
        return objects_in(self.ids)


def objects_in(ids: Ids) -> list[int]:
    """The numbers in a mask but for background and void, ascending."""
    return [int(number) for number in np.unique(ids) if number not in (0, VOID)]


def read_mask(path: str | os.PathLike[str], first: Mask | None = None) -> Mask:
    """Read a mask as VOC, DAVIS and sets of binary masks store it.

    The values are the numbers and 255 is void; in a grey image whose only values are 0 and 255, 255
    is the one object. `first`, the first mask of a video, decides the meaning of 255 in the others.

    Raises:
        UserError: naming the file, if it is missing, damaged, in colour, or grey with 255 beside
            numbers that are not 1, 2, ..., so that 255 may be an object or void.
    """
    if not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113
        raise UserError(f"the mask {path} is no regular file: store it as an indexed or grey PNG")
    try:
        with Image.open(path) as image:
            mode, palette = image.mode, image.getpalette()
            values = np.asarray(image.convert("L") if mode == "1" else image)
    except FileNotFoundError:
        raise UserError(f"the mask {path} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the mask {path} cannot be read: {error}") from None
    if mode not in ("P", "L", "1"):
        raise UserError(
            f"{path} is an image of mode {mode}, not a mask: store the numbers of the objects in "
            "an indexed or grey PNG"
        )
    if palette is not None:
        return Mask(values, tuple(palette))
    if first is not None and not first.white:
        return Mask(values)
    return _grey(values, path)


def _grey(values: Ids, path: str | os.PathLike[str]) -> Mask:
    numbers = [int(number) for number in np.unique(values) if number != 0]
    if numbers == [VOID]:
        return Mask((values == VOID).astype(np.uint8), white=True)
    if VOID in numbers and numbers[:-1] != list(range(1, len(numbers))):
        objects = textwrap.shorten(", ".join(map(str, numbers[:-1])), 40)
        raise UserError(
            f"{path} holds 255 and the objects {objects}: make it black and white, "
            "or number its objects 1, 2, ... and leave 255 for void"
        )
    return Mask(values)


def files_by_name(folder: Path) -> dict[str, Path]:
    """The PNG files in a folder and below, by their relative paths without ending.

    Raises:
        UserError: if there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png")
    if not files:
        raise UserError(f"{folder} holds no masks: store them as indexed or grey PNG files")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def write_mask(mask: Mask, path: Path) -> None:
    """Write a mask as PNG with its palette; `read_mask` returns the same mask."""
    ids = mask.ids * np.uint8(VOID) if mask.white else mask.ids
    image = Image.fromarray(ids)
    if mask.palette is not None:
        image.putpalette(list(mask.palette))
    save_picture(image, path)


def resized_ids(ids: Ids, height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """Resized by Pillow's nearest neighbour."""
    image = Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image)
