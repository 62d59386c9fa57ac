"""Videos with masks of objects on disk, laid out as DAVIS is.

ROOT/ImageSets/2017/val.txt                   one name of a sequence a line
ROOT/JPEGImages/480p/SEQUENCE/00000.jpg ...   frames, in the order of their names
ROOT/Annotations/480p/SEQUENCE/00000.png ...  a mask for each frame, or for the first alone
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS
from dino.evaluate.segmentation.datasets import files_by_stem, read_list
from dino.files import UserError


@dataclass(frozen=True)
class Clip:
    """A video.

    Attributes:
        name: of the sequence.
        frames: files, at least one.
        masks: files: one for each frame, or one alone, of the first frame.
    """

    name: str
    frames: list[Path]
    masks: list[Path]

    @property
    def scored(self) -> bool:
        """Whether there are masks to compare with; the first and last frames never count."""
        return len(self.masks) == len(self.frames) > 2

    def fingerprint(self) -> str:
        """SHA-256 of all files: of the masks their bytes, of the frames their names and sizes."""
        digest = hashlib.sha256()
        for path in self.frames:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for path in self.masks:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def open_davis(
    root: str | Path,
    split: str = "val",
    year: str = "2017",
    resolution: str = "480p",
    sequences: Sequence[str] = (),
) -> list[Clip]:
    """The sequences of a split, or those named; all files are checked before any is read.

    Args:
        root: the folder that holds `JPEGImages`.
        split: name of the list of sequences, without .txt.
        year: folder of the list.
        resolution: folder of frames and masks.
        sequences: names; empty for all of the list, which is not needed otherwise.

    Raises:
        UserError: naming the folder or file that is missing or inconsistent.
    """
    root = Path(root)
    if not (root / "JPEGImages" / resolution).is_dir():
        raise UserError(
            f"{root / 'JPEGImages' / resolution} does not exist: --data must be the DAVIS folder, "
            "and --resolution one of the folders in its JPEGImages"
        )
    names = list(sequences) or read_list(
        root / "ImageSets" / year / f"{split}.txt",
        "choose another with --split and --year, or name the sequences with --sequences",
    )
    return [_clip(root, resolution, name) for name in names]


def _clip(root: Path, resolution: str, name: str) -> Clip:
    images, annotations = (
        root / kind / resolution / name for kind in ("JPEGImages", "Annotations")
    )
    frames = list(files_by_stem(images, EXTENSIONS).values())
    masks = files_by_stem(annotations, (".png",))
    if odd := masks.keys() - {frame.stem for frame in frames}:
        raise UserError(f"the mask {masks[min(odd)]} belongs to no frame of {images}")
    annotated = frames[:1] if len(masks) == 1 else frames
    for frame in annotated:
        if frame.stem not in masks:
            raise UserError(
                f"the frame {frame} has no mask {annotations}/{frame.stem}.png: each frame needs "
                "one, or the first alone"
            )
    clip = Clip(name, frames, [masks[frame.stem] for frame in annotated])
    first, *others = ((path, _size(path)) for path in (*frames[:1], *clip.masks, *frames[1:]))
    for path, (height, width) in others:
        if (height, width) != first[1]:
            raise UserError(
                f"{path} is {width} x {height} pixels, but the first frame {first[0]} "
                f"{first[1][1]} x {first[1][0]}: give all frames and masks of a video one size"
            )
    return clip


def _size(path: Path) -> tuple[int, int]:
    """Height and width. PNGs are decoded, so that a damaged mask is found before the work."""
    try:
        with open_image(path) as image:
            return image.size
    except ImageError as error:
        raise UserError(f"{error}; repair it or remove the sequence") from None
