"""Small videos in the layout of DAVIS: coloured squares that move over grey."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

PALETTE = [0, 0, 0, 200, 10, 20, 30, 180, 40, *range(240)]
SQUARES = {1: (200, 30, 30), 2: (30, 30, 200)}


def frame(time: int, numbers: Sequence[int], size: tuple[int, int] = (32, 40)) -> np.ndarray:
    """The mask of a frame: squares of 8 pixels, that of number n in the n-th quarter of rows."""
    ids = np.zeros(size, dtype=np.uint8)
    for number in numbers:
        ids[8 * number : 8 * number + 8, 4 + 4 * time : 12 + 4 * time] = number
    return ids


def picture(ids: np.ndarray) -> Image.Image:
    pixels = np.full((*ids.shape, 3), 120, dtype=np.uint8)
    pixels[..., 1] = 160
    for number, color in SQUARES.items():
        pixels[ids == number] = color
    return Image.fromarray(pixels)


def save_mask(ids: np.ndarray, path: Path, indexed: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids if indexed else (ids > 0).astype(np.uint8) * np.uint8(255))
    if indexed:
        image.putpalette(PALETTE)
    image.save(path)


def write_davis(
    root: Path, sequences: dict[str, Sequence[int]], frames: int = 5, indexed: bool = True
) -> Path:
    """Sequences by name with the numbers of their objects."""
    for name, numbers in sequences.items():
        for time in range(frames):
            ids = frame(time, numbers)
            images = root / "JPEGImages/480p" / name
            images.mkdir(parents=True, exist_ok=True)
            picture(ids).save(images / f"{time:05}.jpg", quality=95, subsampling=0)
            save_mask(ids, root / "Annotations/480p" / name / f"{time:05}.png", indexed)
    lists = root / "ImageSets/2017"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in sequences))
    return root


def write_video(
    path: Path,
    frames: Sequence[Image.Image],
    rate: Fraction = Fraction(25),
    times: Sequence[int] | None = None,
    codec: str = "libx264",
) -> Path:
    """A video of pictures of one size, at a constant rate or at these times in milliseconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        even = all(side % 2 == 0 for side in frames[0].size)
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
