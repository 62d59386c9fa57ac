"""Videos read and redrawn: every frame, its time, its size; one sentence for each bad file."""

from __future__ import annotations

import builtins
import wave
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.videos import write_video
from PIL import Image

from dino.files import UserError
from dino.show.video_frames import open_video, read_frames, redraw

RATE = Fraction(30_000, 1001)


def pictures(count: int, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Red from the left, on blue, by two more pixels each time."""
    found = []
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), (20, 40, 200), dtype=np.uint8)
        pixels[:, : 2 * number + 2] = (200, 30, 10)
        found.append(Image.fromarray(pixels))
    return found


def reds(path: Path) -> list[int]:
    """How wide the red is in each frame of a video."""
    frames = (np.asarray(frame.picture).astype(int) for frame in read_frames(str(path)))
    return [int((frame[frame.shape[0] // 2, :, 0] > 110).sum()) for frame in frames]


def copied(video: Path, out: Path, advance: Any = lambda count: None) -> tuple[int, list[Path]]:
    def draw(frame: Image.Image) -> Iterator[tuple[str, Image.Image]]:
        yield "same", frame
        yield "grey", frame.convert("L")

    return redraw(open_video(str(video)), lambda name: out / f"{name}.mp4", draw, advance)


@pytest.mark.parametrize("size", [(48, 32), (49, 31)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_frames_times_and_size_stay(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    codec = "ffv1" if name == "a.avi" else "libx264"
    video = write_video(tmp_path / name, pictures(9, size), RATE, codec=codec)
    assert open_video(str(video)).size == size
    advanced: list[int] = []
    count, files = copied(video, tmp_path / "out", advanced.append)
    assert (count, advanced) == (9, [1] * 9)
    assert files == [tmp_path / "out/same.mp4", tmp_path / "out/grey.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grey.mp4", "same.mp4"]
    expected = [float(frame.time * frame.unit) for frame in read_frames(str(video))]
    for path in files:
        found = open_video(str(path))
        assert (found.size, found.frames) == (size, 9)
        times = [float(frame.time * frame.unit) for frame in read_frames(str(path))]
        assert times == pytest.approx(expected, abs=1e-3)
        if name != "a.mkv":  # whose times are rounded to milliseconds
            assert found.rate == pytest.approx(RATE)
    assert reds(files[0]) == pytest.approx([2 * number + 2 for number in range(9)], abs=1)


def test_uneven_times_stay(tmp_path: Path) -> None:
    times = [0, 10, 20, 150, 151, 400]
    video = write_video(tmp_path / "a.mp4", pictures(6), times=times)
    _, (same, _) = copied(video, tmp_path)
    found = [round(1000 * frame.time * frame.unit) for frame in read_frames(str(same))]
    assert found == times


def test_colors_stay(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", pictures(3))
    _, (same, grey) = copied(video, tmp_path)
    first = next(read_frames(str(same))).picture
    for place, color in (((40, 16), (20, 40, 200)), ((0, 16), (200, 30, 10))):
        assert np.abs(np.subtract(first.getpixel(place), color)).max() < 12  # type: ignore[arg-type]
    red, green, blue = np.asarray(next(read_frames(str(grey))).picture).astype(int).T
    assert max(np.abs(red - green).max(), np.abs(green - blue).max()) <= 2


def test_videos_of_phones_are_upright(tmp_path: Path) -> None:
    """Stored lying, with a matrix that turns it by 90 degrees counter-clockwise."""
    video = write_video(tmp_path / "a.mp4", pictures(4))
    plain = (b"\0\1\0\0", bytes(12), b"\0\1\0\0", bytes(12), b"@\0\0\0")
    turned = (bytes(4), b"\xff\xff\0\0", bytes(4), b"\0\1\0\0", bytes(16), b"@\0\0\0")
    content = video.read_bytes()
    place = content.index(b"".join(plain), content.index(b"tkhd"))  # of the track
    video.write_bytes(content[:place] + b"".join(turned) + content[place + 36 :])
    assert open_video(str(video)).size == (32, 48)
    first = next(read_frames(str(video))).picture
    assert first.getpixel((16, 47))[0] > 150  # type: ignore[index]
    assert first.getpixel((16, 0))[2] > 150  # type: ignore[index]
    _, (same, _) = copied(video, tmp_path)
    assert open_video(str(same)).size == (32, 48)
    assert next(read_frames(str(same))).picture.getpixel((16, 47))[0] > 150  # type: ignore[index]


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    half = write_video(tmp_path / "half.mp4", pictures(9)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(half[: len(half) // 2])
    for name in ("text", "empty", "half"):
        with pytest.raises(UserError, match=rf"{name}\.mp4 cannot be read as a video \("):
            open_video(str(tmp_path / f"{name}.mp4"))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    with pytest.raises(UserError, match="holds no pictures: check the file"):
        open_video(str(tmp_path / "a.wav"))


def test_a_video_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    video = write_video(tmp_path / "a.mp4", [Image.fromarray(pixels) for pixels in noise])
    found = open_video(str(video))

    def draw(frame: Image.Image) -> Iterator[tuple[str, Image.Image]]:
        yield "same", frame
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        redraw(found, lambda name: tmp_path / "out" / name, draw, lambda count: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_frames_do_not_stay_in_memory(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", pictures(12))
    drawn: list[weakref.ref[Image.Image]] = []

    def draw(frame: Image.Image) -> Iterator[tuple[str, Image.Image]]:
        drawn.append(weakref.ref(frame))
        assert sum(one() is not None for one in drawn) <= 2  # this one, and the one before
        yield "same", frame.copy()

    redraw(open_video(str(video)), lambda name: tmp_path / "b.mp4", draw, lambda count: None)
    assert len(drawn) == 12


def test_without_av_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "av":
            raise ImportError(name="av")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(UserError, match=r"a video needs av: pip install 'dino-ssl\[video\]'"):
        open_video(str(tmp_path / "a.mp4"))
