"""Videos read and redrawn frame by frame, with their size and rate."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dino.data.sources.base import needs_extra
from dino.files import UserError, replacing

QUALITY = {"crf": "18"}
"""Of H.264, which every player has: no loss that can be seen."""

BT601 = 6
"""The colour space that av converts to, as H.264 numbers it; players would guess another."""

Draw = Callable[[Image.Image], Iterable[tuple[str, Image.Image]]]
"""From a frame to pictures of its size, each under the name of its video."""


class Video(NamedTuple):
    """A video whose first frame can be read.

    Attributes:
        path: its file.
        size: width and height in pixels, upright.
        frames: their number; None where the file does not say it.
        rate: frames a second; None where it is unknown.
    """

    path: str
    size: tuple[int, int]
    frames: int | None
    rate: Fraction | None


class Frame(NamedTuple):
    """An upright frame, shown from `time` on, which counts units of `unit` seconds."""

    picture: Image.Image
    time: int
    unit: Fraction


def open_video(path: str) -> Video:
    """Read what is known of a video, and its first frame.

    Raises:
        UserError: if it cannot be read, holds no frames, or the package av is not installed.
    """
    with closing(read_frames(path)) as frames:
        size = next(frames).picture.size
    with _reading(path) as (_, stream):
        return Video(path, size, stream.frames or None, stream.average_rate)


def read_frames(path: str) -> Generator[Frame, None, None]:
    """The frames of a video in the order in which they are shown, one at a time.

    Raises:
        UserError: if it cannot be read, holds no frames, or the package av is not installed.
    """
    number = -1
    with _reading(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            picture = frame.to_image()
            if frame.rotation:  # a phone's, stored as the sensor lies
                picture = picture.rotate(frame.rotation, expand=True)
            yield Frame(picture, number if frame.pts is None else frame.pts, stream.time_base)
    if number < 0:
        raise UserError(f"{path} holds no frames: check the file")


@contextmanager
def _reading(path: str) -> Iterator[tuple[Any, Any]]:
    """A video's container, and its first stream of pictures."""
    with needs_extra("video", "a video"):
        import av
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no pictures: check the file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a video ({error.strerror})") from error


def redraw(
    video: Video, target: Callable[[str], Path], draw: Draw, advance: Callable[[int], object]
) -> tuple[int, list[Path]]:
    """Draw a video anew, as one or more MP4 files of its size and with its times of frames.

    A frame is in memory at a time, and those that H.264 looks ahead to. Sound is left out. The
    files are written atomically: after an error there is none.

    Args:
        video: what `open_video` found.
        target: from a name to the file for pictures of this name.
        draw: draws pictures of the same names for every frame.
        advance: called with 1 after each frame.

    Returns:
        The number of frames, and the files.

    Raises:
        UserError: if the video cannot be read to its end.
    """
    writers: dict[str, Callable[[Image.Image, Frame], None]] = {}
    count = 0
    with ExitStack() as stack:
        for frame in read_frames(video.path):
            for name, picture in draw(frame.picture):
                if name not in writers:
                    temporary = stack.enter_context(replacing(target(name)))
                    writers[name] = stack.enter_context(_writing(temporary, video, frame.unit))
                writers[name](picture, frame)
            count += 1
            advance(1)
    return count, [target(name) for name in writers]


@contextmanager
def _writing(
    path: Path, video: Video, unit: Fraction
) -> Iterator[Callable[[Image.Image, Frame], None]]:
    """A function that appends a picture to an MP4 file, at the time of a frame."""
    import av

    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=video.rate, options=QUALITY)
            stream.width, stream.height = video.size
            # Colours for two by two pixels, which every player has, need even sides.
            stream.pix_fmt = "yuv444p" if any(side % 2 for side in video.size) else "yuv420p"
            stream.codec_context.time_base, stream.codec_context.colorspace = unit, BT601

            def write(picture: Image.Image, at: Frame) -> None:
                frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), "rgb24")
                frame.pts, frame.time_base = at.time, unit
                container.mux(stream.encode(frame))

            yield write
            container.mux(stream.encode())
    except av.FFmpegError as error:  # an OSError of av, whose file name cannot be changed
        raise OSError(error.errno, error.strerror, str(path)) from error
