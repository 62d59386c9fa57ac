"""What libraries print goes into the defect of its image; nothing that is no file is waited for."""

from __future__ import annotations

import io
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dino.data.commands.check import check
from dino.data.images.decode import open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sources.open import open_source

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def damaged_tiff() -> bytes:
    """Compressed rows whose middle is spoiled: libtiff prints, Pillow raises a number."""
    Image.fromarray(NOISE).save(stream := io.BytesIO(), "TIFF", compression="tiff_adobe_deflate")
    content = bytearray(stream.getvalue())
    content[300:340] = b"\0" * 40
    return bytes(content)


def long_tag() -> bytes:
    """Pillow warns of EXIF whose value is longer than the file."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 50
    Image.fromarray(NOISE).save(stream := io.BytesIO(), "JPEG", exif=exif)
    content = stream.getvalue()
    place = content.index(b"\x01\x0e\0\x02") if b"\x01\x0e\0\x02" in content else -1
    little = content.index(b"\x0e\x01\x02\0") if place < 0 else place
    return content[: little + 4] + b"\xff\xff\0\0" + content[little + 8 :]


def no_page() -> bytes:
    """tifffile logs an error about the offset of the first page."""
    tifffile.imwrite(stream := io.BytesIO(), np.zeros((5, 8, 9)), planarconfig="separate")
    content = stream.getvalue()
    return content[:4] + b"\xff\xff\xff\0" + content[8:]


@pytest.mark.usefixtures("unchecked")  # facts about images travel as arrays in a source
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="stderr of C code is left alone")
def test_nothing_is_printed_and_the_defect_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in (
        ("a.tif", damaged_tiff()),
        ("b.jpg", long_tag()),
        ("d.tif", no_page()),
    ):
        (tmp_path / name).write_bytes(content)
    checked = check(open_source(tmp_path), RGB, workers=1)
    captured = capfd.readouterr()
    assert captured.err + captured.out == ""
    reasons = {Path(path).name: reason for path, (_, reason) in checked.bad.items()}
    assert reasons.keys() == {"a.tif", "d.tif"}
    assert "ZIPDecode" in reasons["a.tif"]
    assert "invalid offset to first page" in reasons["d.tif"]


def test_stderr_of_the_main_process_stays(capfd: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(stream := io.BytesIO(), NOISE.astype(np.float32), photometric="rgb")
    with open_image(stream) as image:
        print("still here", file=sys.stderr)
        assert image.size == (40, 50)
    assert capfd.readouterr().err == "still here\n"


def test_a_large_image_is_read_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    Image.fromarray(NOISE).save(stream := io.BytesIO(), "PNG")
    assert read_image(stream).size == (50, 40)
    assert not recwarn.list


# ---------------------------------------------------------------------------------- no files
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, and a device read for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.npy").symlink_to("pipe.jpg")
    for path in tmp_path.iterdir():
        for pixels in (RGB, PixelFormat(5)):
            with pytest.raises(ImageError) as caught:
                read_image(path, pixels=pixels)
            assert caught.value.defect == "unreadable"
    with pytest.raises(ImageError, match="it is a pipe or a device, no regular file"):
        read_image(tmp_path / "pipe.jpg")
