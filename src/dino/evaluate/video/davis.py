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

from PIL import Image, UnidentifiedImageError

from dino.data.images.pixel_format import EXTENSIONS
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
        UserError: naming the folder or file that is missing or does not fit.
    """
    root = Path(root)
    if not (root / "JPEGImages" / resolution).is_dir():
        raise UserError(
            f"{root / 'JPEGImages' / resolution} does not exist: --data must be the DAVIS folder, "
            "and --resolution one of the folders in its JPEGImages"
        )
    names = list(sequences) or _listed(root / "ImageSets" / year / f"{split}.txt")
    return [_clip(root, resolution, name) for name in names]


def _listed(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"the list of sequences {path} is missing: choose another with --split and --year, or "
            "name the sequences with --sequences"
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    if not names:
        raise UserError(f"the list of sequences {path} is empty")
    return names


def _clip(root: Path, resolution: str, name: str) -> Clip:
    images, annotations = (root / part / resolution / name for part in _FOLDERS)
    frames, masks = _files(images, EXTENSIONS), _files(annotations, (".png",))
    by_stem = {path.stem: path for path in masks}
    if frames[0].stem not in by_stem:
        raise UserError(f"the first frame {frames[0]} has no mask {annotations}/{_png(frames[0])}")
    wanted = frames[:1] if len(masks) == 1 else frames
    missing = [frame for frame in wanted if frame.stem not in by_stem]
    if missing:
        raise UserError(
            f"{missing[0]} has no mask {annotations}/{_png(missing[0])}: each frame needs one, or "
            "the first alone"
        )
    if len(masks) > len(wanted):
        stems = {frame.stem for frame in frames}
        odd = next(path for path in masks if path.stem not in stems)
        raise UserError(f"the mask {odd} belongs to no frame of {images}")
    clip = Clip(name, frames, [by_stem[frame.stem] for frame in wanted])
    _check_sizes(clip)
    return clip


_FOLDERS = ("JPEGImages", "Annotations")


def _png(frame: Path) -> str:
    return f"{frame.stem}.png"


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"the folder {folder} is missing")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not found:
        raise UserError(f"{folder} holds no files that end in {' '.join(endings)}")
    return found


def _check_sizes(clip: Clip) -> None:
    """All frames and masks of a video have one size; only the heads of the files are read."""
    first = _size(clip.frames[0])
    for path in (*clip.masks, *clip.frames[1:]):
        size = _size(path)
        if size != first:
            raise UserError(
                f"{path} is {size[0]} x {size[1]} pixels, but the first frame {clip.frames[0]} "
                f"{first[0]} x {first[1]}: give all frames and masks of a video one size"
            )


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None
