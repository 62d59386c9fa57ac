"""Damaged files of every kind: an image or an `ImageError`, nothing else, in bounded memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers.dicoms import dicom
from helpers.spoiled import bomb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dino.data.images.decode import open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.data.loader import evaluation_loader
from dino.data.sources.open import open_source

FORMATS = (
    PixelFormat(),
    PixelFormat(1),
    PixelFormat(5),
    PixelFormat(3, page=1),
    PixelFormat(5, low=(0.0,), high=(1000.0,)),
    PixelFormat(1, low=(-5.0,), high=(5.0,)),
)


@lru_cache(maxsize=1)
def intact() -> dict[str, bytes]:
    """One small file of each kind, by what it is."""
    ramp = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    picture, word = Image.fromarray(ramp), np.arange(24 * 20, dtype=np.uint16).reshape(24, 20) * 99
    bands = np.stack([word + band for band in range(5)])
    exif = Image.Exif()
    exif[0x0112] = 6
    files: dict[str, bytes] = {}

    def saved(name: str, image: Image.Image, kind: str, **options: object) -> None:
        image.save(stream := io.BytesIO(), kind, **options)
        files[name] = stream.getvalue()

    def tiff(name: str, values: np.ndarray, **options: object) -> None:
        tifffile.imwrite(stream := io.BytesIO(), values, **options)
        files[name] = stream.getvalue()

    def npy(name: str, values: np.ndarray) -> None:
        np.save(stream := io.BytesIO(), values)
        files[name] = stream.getvalue()

    saved("jpeg", picture, "JPEG", exif=exif)
    saved("progressive jpeg", picture, "JPEG", progressive=True)
    saved("png", picture, "PNG")
    saved("png of 16 bits", Image.fromarray(word), "PNG")
    saved("png of a palette", picture.quantize(8), "PNG", transparency=0)
    saved("webp", picture, "WEBP")
    saved("bmp", picture, "BMP")
    saved("gif", picture, "GIF", save_all=True, append_images=[picture.rotate(90)])
    saved("tiff", picture, "TIFF", compression="tiff_lzw")
    tiff("tiff in tiles", ramp, photometric="rgb", tile=(16, 16), compression="zlib")
    tiff("tiff of 16 bits", word, photometric="minisblack", rowsperstrip=5)
    tiff("tiff of pages", bands, photometric="minisblack")
    tiff("tiff of 5 samples", bands, photometric="minisblack", planarconfig="separate")
    tiff("tiff of floats", bands.astype(np.float32), photometric="minisblack", compression="lzw")
    npy("npy", ramp)
    npy("npy of floats", bands.astype(np.float64))
    stream = io.BytesIO()
    dicom(stream, word, WindowCenter=500, WindowWidth=100)
    files["dicom"] = stream.getvalue()
    return files


# ---------------------------------------------------------------------------------- damage
def _cut(content: bytes, place: int, junk: bytes) -> bytes:
    return content[:place]


def _overwrite(content: bytes, place: int, junk: bytes) -> bytes:
    return content[:place] + junk + content[place + len(junk) :]


def _insert(content: bytes, place: int, junk: bytes) -> bytes:
    return content[:place] + junk + content[place:]


def _remove(content: bytes, place: int, junk: bytes) -> bytes:
    return content[:place] + content[place + len(junk) :]


def _flip(content: bytes, place: int, junk: bytes) -> bytes:
    flipped = bytearray(content)
    for step, bit in enumerate(junk):  # a few bits here and there, from this place on
        if (at := place + step * bit) < len(flipped):
            flipped[at] ^= 1 << bit % 8
    return bytes(flipped)


def _splice(content: bytes, place: int, junk: bytes) -> bytes:
    other = list(intact().values())[junk[0] % len(intact())]
    return content[:place] + other[place:]


DAMAGES: tuple[Callable[[bytes, int, bytes], bytes], ...] = (
    *(_cut, _overwrite, _overwrite, _insert, _remove, _flip, _flip, _splice),
)
JUNK = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1"]),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of some kind after one to four mishaps, most of them near its start."""
    content = intact()[draw(st.sampled_from(sorted(intact())))]
    for _ in range(draw(st.integers(1, 4))):
        reach = draw(st.sampled_from([len(content), min(len(content), 200)]))
        place = draw(st.integers(0, max(0, reach - 1)))
        content = draw(st.sampled_from(DAMAGES))(content, place, draw(JUNK))
    return content


# ---------------------------------------------------------------------------------- reading
@contextmanager
def as_in_a_run() -> Iterator[None]:
    """What other packages warn of is no error there; what we compute must not even warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        yield


def survive(content: bytes, pixels: PixelFormat) -> bool:
    """Read it in every way; whether it still is an image."""
    usable = True
    with as_in_a_run():
        for factor in (1, 4):
            try:
                with open_image(io.BytesIO(content), "fuzzed", pixels) as image:
                    sample = image.decode(factor)
            except ImageError as error:
                usable = False
                if "\n" in str(error):
                    pytest.fail(f"not one line: {error!r}")
                continue
            if isinstance(sample, Tensor):
                assert sample.dtype == torch.uint8
                assert len(sample) == pixels.channels
                assert sample.numel() > 0
            else:
                assert sample.mode == "RGB"
        try:
            with open_image(io.BytesIO(content), "fuzzed", pixels) as image:
                values = image.values()
            assert values.ndim == 3
            assert values.dtype.kind in "buif"
        except ImageError:
            usable = False
    return usable


def test_intact_files_are_images() -> None:
    for name, content in intact().items():
        assert any(survive(content, pixels) for pixels in FORMATS), name


@given(damaged(), st.sampled_from(FORMATS))
def test_damaged_files_are_images_or_image_errors(content: bytes, pixels: PixelFormat) -> None:
    survive(content, pixels)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"BM"]))
def test_random_bytes_are_image_errors(content: bytes, start: bytes) -> None:
    survive(start + content, FORMATS[0])
    survive(start + content, FORMATS[2])


def test_a_worker_survives_them_all(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(120):
        content = list(intact().values())[number % len(intact())]
        for _ in range(1 + number % 3):
            damage = DAMAGES[random.integers(len(DAMAGES))]
            content = damage(content, int(random.integers(len(content) + 1)), random.bytes(4))
        (tmp_path / f"{number:03}.png").write_bytes(content)
    source = open_source(tmp_path)

    def tiny(sample: object) -> Tensor:
        return torch.ones(1, 1, 1)

    with as_in_a_run():
        parts = list(evaluation_loader(source, tiny, 16, workers=1))
    usable = [index for part in parts for index in part.index.tolist()]
    skipped = [error for part in parts for error in part.skipped]
    assert len(usable) + len(skipped) == 120
    assert {error.path for error in skipped}.isdisjoint(source.path(index) for index in usable)
    assert len(usable) > 0
    assert len(skipped) > 0


# ---------------------------------------------------------------------------------- size
def _npy(shape: tuple[int, ...], kind: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + b"\0" * 100


def _tiff(tags: dict[int, int], bits: int = 8) -> bytes:
    """A little-endian TIFF of one page with the tags given and 16 bytes of values."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 16} | tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in sorted(tags.items()))
    offset = struct.pack("<I", 24)
    return b"II*\0" + offset + b"\0" * 16 + struct.pack("<H", len(tags)) + entries + b"\0" * 4


MILLION = 10**6
CLAIMS = {
    "png": bomb(MILLION, MILLION),
    "npy": _npy((MILLION, MILLION), "|u1"),
    "npy that fits": _npy((13_000, 13_000), "<f8"),
    "npy of negative length": _npy((-1, 1, 1), "<u2"),
    "tiff": _tiff({256: MILLION, 257: MILLION, 278: MILLION}),
    "tiff of many samples": _tiff({256: MILLION, 257: 10, 277: 60_000}),
    "tiff in one tile": _tiff({322: MILLION // 16 * 16, 323: MILLION // 16 * 16, 324: 8, 325: 16}),
    "tiff in a huge tile": _tiff({259: 5, 322: MILLION // 16 * 16, 323: 16 * 16, 324: 8, 325: 16}),
    "tiff of rows that are not there": _tiff({257: 8 * MILLION, 278: 1, 259: 5}),
    "bmp": b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, MILLION, MILLION, 1, 24, 0, 0, 0, 0, 0, 0
    ),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\0;",
}  # fmt: skip

LIMITED = """
import resource, sys, warnings
from pathlib import Path
from dino.data.images.decode import read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
import tifffile
warnings.simplefilter("ignore")
used = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
most = used() + 1600 * 2**20  # address space: decoders may ask for it, and give it back
resource.setrlimit(resource.RLIMIT_AS, (most, most))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    for channels in (1, 3, 5):
        try:
            read_image(path, pixels=PixelFormat(channels))
            print(path.name, channels, "was read")
        except ImageError as error:
            pass
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10, "MiB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and counts in KiB")
def test_sizes_that_are_only_claimed_take_no_memory(tmp_path: Path) -> None:
    for name, content in CLAIMS.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
    scan = tmp_path / "a.dcm"
    dicom(scan, np.zeros((4, 4), np.uint16), Rows=65535, Columns=65535, NumberOfFrames=1000)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grown = done.stdout.strip().splitlines()
    assert len(grown) == 1, done.stdout
    assert int(grown[0].split()[2]) < 64, done.stdout


def test_strips_that_are_not_there_are_not_waited_for() -> None:
    content = _tiff({257: 8 * MILLION, 278: 1, 259: 5})
    with pytest.raises(ImageError, match="not all of its strips or tiles are there"):
        read_image(io.BytesIO(content), "rows", PixelFormat(5))
