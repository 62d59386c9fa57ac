"""TIFF by one rule: what tifffile writes is read with the same values, whatever its tags say."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from helpers.reading import levels, misfit, stored_values
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dino.data.commands.stats import measure
from dino.data.images.bit_depth import Stored, upright
from dino.data.images.decode import open_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source

RNG = np.random.default_rng(0)
FIVE = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7) * 257  # values 0 to 209 after that


def tiff(path: Path, values: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, values, **{"photometric": "minisblack", **options})
    return path


def written(values: np.ndarray, **options: Any) -> io.BytesIO:
    tifffile.imwrite(stream := io.BytesIO(), values, **{"metadata": None, **options})
    return stream


# ---------------------------------------------------------------------------------- the grid
KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8")


@st.composite
def pages(draw: st.DrawFn) -> tuple[io.BytesIO, np.ndarray, int, bool, bool, int]:
    """A TIFF, its values [C, H, W], their bits, whether 0 is white, or colour, and orientation."""
    bits = draw(st.sampled_from([0, 0, 0, *range(9, 16)]))
    kind = np.dtype("u2" if bits else draw(st.sampled_from(KINDS)))
    photometric = draw(st.sampled_from(["minisblack", "miniswhite", "rgb"]))
    samples = 3 if photometric == "rgb" else draw(st.sampled_from([1, 1, 2, 4]))
    planar = draw(st.sampled_from(["contig", "separate"]))
    orientation, seed = draw(st.integers(1, 8)), draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    values = random.integers(0, 2 ** (bits or 8 * kind.itemsize) - 1, (samples, 20, 18), np.uint64)
    if kind.kind == "f":
        values = random.normal(size=values.shape)
    values = values.astype(kind)
    options: dict[str, Any] = {"byteorder": draw(st.sampled_from("<>"))}
    if bits:  # tifffile swaps packed bits that it writes in big-endian files
        options |= {"bitspersample": bits, "byteorder": "<"}
    else:
        options["compression"] = draw(st.sampled_from([None, "zlib", "lzw", "packbits"]))
        predictor = options["compression"] in ("zlib", "lzw") and kind.itemsize < 8
        options["predictor"] = draw(st.booleans()) if predictor else None
        options["tile"] = draw(st.sampled_from([None, (16, 16)]))
        options["rowsperstrip"] = None if options["tile"] else draw(st.sampled_from([None, 7]))
    stored = values if planar == "separate" else np.moveaxis(values, 0, 2)
    if samples == 1:
        stored = stored.squeeze()
    else:
        options["planarconfig"] = planar
    tags = [(274, "H", 1, orientation, True)]
    stream = written(stored, photometric=photometric, extratags=tags, **options)
    return stream, values, bits, photometric == "miniswhite", samples == 3, orientation


@given(pages())
def test_every_tiff_has_the_values_that_were_written(
    page: tuple[io.BytesIO, np.ndarray, int, bool, bool, int],
) -> None:
    stream, values, bits, inverted, colour, orientation = page
    values = upright(values, orientation)
    pixels = PixelFormat(len(values))
    with open_image(stream, "a", pixels) as image:
        assert image.size == values.shape[1:]
        kind = values.dtype
        assert image.stored == Stored(len(values), bits or 8 * kind.itemsize, kind.kind == "f")
        assert image.values().dtype == kind
        assert np.array_equal(image.values(), values)
        found = image.decode().numpy().astype(int) if image.stored.bits != 8 or inverted else None
    if found is not None and kind.kind == "u" and kind.itemsize == 2:
        shares = values / (2 ** (bits or 16) - 1)
        assert np.abs(found - 255 * (1 - shares if inverted else shares)).max() <= 1
    low, high = (-1.0, 1.0) if kind.kind == "f" else (10.0, 200.0)
    found = levels(stream, len(values), low=(low,), high=(high,))
    shares = np.clip((values.astype(float) - low) / (high - low), 0, 1)
    assert np.abs(found - 255 * (1 - shares if inverted else shares)).max() <= 1
    if colour and kind.kind != "f":
        grey = stored_values(stream, PixelFormat(1)).astype(float)
        assert np.abs(grey - np.tensordot((0.299, 0.587, 0.114), values, 1)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_the_orientation_is_that_of_pillow(orientation: int, kind: type) -> None:
    """8 bits are turned by Pillow, 16 by us; the size is known before."""
    values = RNG.integers(0, 255, (12, 10, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(png := io.BytesIO(), "PNG", exif=exif)
    unit = 1 if kind is np.uint8 else 257
    tags = [(274, "H", 1, orientation, True)]
    stream = written(values.astype(kind) * kind(unit), photometric="rgb", extratags=tags)
    expected = levels(png)
    with open_image(stream) as image:
        assert image.size == expected.shape[1:]
    assert np.array_equal(levels(stream), expected)


# ---------------------------------------------------------------------------------- colours
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_miniswhite_turns_the_levels(planar: str) -> None:
    """Values and ranges stay in the units of the file."""
    values = np.array([[0, 100, 200, 400]], np.uint16)
    stream = written(values, photometric="miniswhite")
    assert np.array_equal(stored_values(stream), values[None])
    assert levels(stream, 1, low=(0.0,), high=(400.0,)).tolist() == [[[255, 191, 128, 0]]]
    assert levels(stream, 1)[0, 0].tolist() == [255, 254, 254, 253]
    bits = written(np.array([[0, 1] * 8], bool), photometric="miniswhite")
    assert levels(bits, 1)[0, 0].tolist() == [255, 0] * 8
    byte = written(np.array([[0, 9, 255]], np.uint8), photometric="miniswhite")
    assert levels(byte, 1).tolist() == [[[255, 246, 0]]]
    assert levels(byte, 1, low=(0.0,), high=(255.0,)).tolist() == [[[255, 246, 0]]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_palettes_are_looked_up(kind: type) -> None:
    colours = RNG.integers(0, 65535, (3, 2 ** (8 * np.dtype(kind).itemsize)), dtype=np.uint16)
    indices = RNG.integers(0, 255, (9, 8)).astype(kind)
    stream = written(indices, photometric="palette", colormap=colours)
    expected = colours[:, indices]
    assert np.abs(levels(stream).astype(int) - expected / 257).max() <= 1
    assert levels(stream, 1).shape == (1, 9, 8)
    with open_image(stream) as image:
        assert image.stored.channels == 3


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_cmyk_becomes_rgb(kind: type, planar: str) -> None:
    inks = RNG.integers(0, 255, (4, 12, 10)).astype(np.uint8)
    expected = np.asarray(Image.merge("CMYK", [*map(Image.fromarray, inks)]).convert("RGB"))
    values = inks.astype(kind) * kind(1 if kind is np.uint8 else 257)
    stored = values if planar == "separate" else np.moveaxis(values, 0, 2)
    stream = written(stored, photometric="separated", planarconfig=planar)
    assert np.abs(levels(stream).astype(int) - np.moveaxis(expected, 2, 0)).max() <= 1
    assert np.array_equal(stored_values(stream, PixelFormat(4)), values)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_cielab_becomes_rgb(kind: type) -> None:
    """As the colour management of Pillow does it, for colours that sRGB has."""
    rgb = RNG.integers(0, 255, (12, 10, 3)).astype(np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(Image.fromarray(rgb), srgb, lab, outputMode="LAB")
    light, *signed = np.moveaxis(np.asarray(made), 2, 0)  # a and b are signed
    signed = np.stack([light.astype(int), *(plane.astype(np.int8) for plane in signed)], axis=2)
    scale = (1, 1, 1) if kind is np.uint8 else (257, 256, 256)
    stored = (signed * scale).astype(np.int64).astype(kind)
    stream = written(stored, photometric="cielab", planarconfig="contig")
    exact = ImageCms.Flags.NOOPTIMIZE  # else a table of 33 x 33 x 33 colours is interpolated
    back = ImageCms.profileToProfile(made, lab, srgb, outputMode="RGB", flags=exact)
    expected = np.moveaxis(np.asarray(back), 2, 0)
    assert np.abs(levels(stream).astype(int) - expected).max() <= 2
    assert levels(stream, 1).shape == (1, 12, 10)


def test_other_colours_are_named() -> None:
    stream = written(np.zeros((8, 8, 3), np.uint8), photometric="icclab", planarconfig="contig")
    assert "its colours are ICCLAB: convert it to RGB or grey" in misfit(stream)


def test_a_band_marked_as_transparency_is_not_composited() -> None:
    bands = RNG.integers(20, 70, (8, 9, 4)).astype(np.uint8)
    stream = written(bands, photometric="rgb", extrasamples=["unassalpha"])
    for wanted in (1, 3):
        found = misfit(stream, wanted)
        assert "the last of its 4 channels is marked as transparency, but may be a band" in found
        assert "say --channels 4 to learn from all of them" in found
    assert np.array_equal(levels(stream, 4), np.moveaxis(bands, 2, 0))
    bands[..., 3] = 255  # opaque: nothing is lost without it
    for extra in ("unassalpha", "assocalpha"):
        opaque = written(bands, photometric="rgb", extrasamples=[extra])
        assert np.array_equal(levels(opaque), np.moveaxis(bands, 2, 0)[:3])
    other = written(bands, photometric="rgb", extrasamples=["unspecified"])
    assert "it has 4 channels, not 3: say --channels 4" in misfit(other)


# ---------------------------------------------------------------------------------- pages and axes
@pytest.mark.parametrize("form", ["imagej", "ome"])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_channels_that_are_pages_are_read_by_their_axes(form: str, channels: int) -> None:
    values = RNG.integers(0, 999, (channels, 12, 10), dtype=np.uint16)
    options = {form: True, "metadata": {"axes": "CYX"}, "photometric": "minisblack"}
    stream = written(values, **options)
    assert np.array_equal(stored_values(stream, PixelFormat(channels)), values)
    for wanted in {1, 3} - {channels}:
        assert f"it has {channels} channels, not {wanted}" in misfit(stream, wanted)


@pytest.mark.parametrize(("axes", "words"), [("ZYX", "4 in depth"), ("TYX", "4 in time")])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_stack_is_said_to_be_one(axes: str, words: str, kind: type) -> None:
    values = RNG.integers(0, 99, (4, 12, 10)).astype(kind)
    stream = written(values, imagej=True, metadata={"axes": axes}, photometric="minisblack")
    for wanted in (1, 3, 4):
        found = misfit(stream, wanted)
        assert f"it is a stack of 4 pages ({words}): choose one by --page NUMBER" in found
    assert np.array_equal(stored_values(stream, PixelFormat(1, 2)), values[2:3])
    assert np.array_equal(stored_values(stream, PixelFormat(2, 1)), values[1:3])


def test_channels_and_depth_together_are_a_stack() -> None:
    values = RNG.integers(0, 99, (4, 2, 12, 10)).astype(np.uint8)
    stream = written(values, ome=True, metadata={"axes": "ZCYX"}, photometric="minisblack")
    assert "it is a stack of 8 pages (4 in depth)" in misfit(stream, 2)
    assert np.array_equal(stored_values(stream, PixelFormat(2, 2)), values[1])


def test_pages_of_no_stated_meaning_are_channels_if_as_many_were_requested() -> None:
    stream = written(FIVE, photometric="minisblack")
    assert np.array_equal(stored_values(stream, PixelFormat(5)), FIVE)
    for wanted in (1, 3, 4):
        assert "it is a stack of 5 pages (5 in pages)" in misfit(stream, wanted)
    three = written(FIVE[:3].astype(np.uint8), photometric="minisblack")
    assert "it is a stack of 3 pages" in misfit(three)


def test_the_nodata_of_gdal_may_be_nan_or_no_number() -> None:
    values = np.array([[np.nan, 1.0, 3.0]], np.float32)
    for nodata, found in (("nan", [128, 0, 255]), ("none", [128, 0, 255]), ("3", [0, 0, 0])):
        stream = written(values, photometric="minisblack", extratags=[(42113, "s", 0, nodata)])
        assert levels(stream, 1).tolist() == [[found]]


@pytest.mark.usefixtures("unchecked")  # pixels travel as arrays in a source
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_the_nodata_of_gdal_is_filled_and_left_out(kind: type, tmp_path: Path) -> None:
    nodata = "-3.4028234663852886e+38" if kind is np.float32 else "0"
    values = RNG.integers(100, 200, (64, 64)).astype(kind)
    values[:32] = kind(float(nodata))
    values[40, 40] = 250
    tags = [(42113, "s", 0, nodata, True)]
    for number in range(3):
        tiff(tmp_path / f"{number}.tif", values, extratags=tags, metadata=None)
    found = levels(tmp_path / "0.tif", 1, low=(100.0,), high=(200.0,))[0]
    assert np.abs(found[:32].astype(int) - 127).max() <= 4
    stats, _ = measure(open_source(tmp_path), PixelFormat(1), range="percentile")
    assert stats.low is not None
    assert stats.high is not None
    assert 100 <= stats.low[0] < stats.high[0] <= 250
    assert stats.nodata_share[0] == pytest.approx(0.5, abs=0.03)
    assert stats.mean[0] == pytest.approx(0.5, abs=0.1)
    blind, _ = measure(open_source(tmp_path), PixelFormat(1, nodata=77.0), range="percentile")
    assert blind.nodata_share == (0.0,)


@pytest.mark.parametrize("form", ["plain", "ome"])
def test_images_of_several_sizes_are_said_to_be_several(form: str, tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (12, 10)).astype(np.uint8)
    path = tmp_path / ("a.ome.tif" if form == "ome" else "a.tif")
    with tifffile.TiffWriter(path) as writer:
        for part in (values, values[:7]):
            writer.write(part, photometric="minisblack", metadata=None if form == "plain" else {})
    assert "it holds 2 images of different sizes or kinds: choose one by --page" in misfit(path)
    assert np.array_equal(levels(path, 1, 1)[0], values[:7])


@pytest.mark.parametrize("place", ["before", "after", "in a tree"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_overviews_and_thumbnails_are_no_images(place: str, kind: type) -> None:
    values = RNG.integers(0, 255, (64, 48, 3)).astype(kind)
    small = np.ascontiguousarray(values[::2, ::2])
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(stream := io.BytesIO()) as writer:
        if place == "before":
            writer.write(small, subfiletype=1, **options)
        writer.write(values, subifds=1 if place == "in a tree" else None, **options)
        if place != "before":
            writer.write(small, subfiletype=1, **options)
    assert np.array_equal(stored_values(stream), np.moveaxis(values, 2, 0))


# ---------------------------------------------------------------------------------- both libraries
def test_tiles_that_a_sparse_file_leaves_out_are_black() -> None:
    """As GDAL writes them: offset and length are 0, where Pillow would read the header."""
    values = np.zeros((32, 32), np.uint8)
    values[16:] = 7
    stream = written(values, photometric="minisblack", tile=(16, 16), metadata=None)
    content = bytearray(stream.getvalue())
    with tifffile.TiffFile(io.BytesIO(stream.getvalue())) as tiff:
        tags = [tiff.pages[0].tags[tag] for tag in (324, 325)]
        sizes = {"H": 2, "I": 4}
        for tag in tags:
            size = sizes[tag.dtype.name[0].replace("S", "H").replace("L", "I")]
            content[tag.valueoffset : tag.valueoffset + 2 * size] = bytes(2 * size)
    assert np.array_equal(levels(io.BytesIO(content), 1)[0], values)


def test_where_tifffile_fails_pillow_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.integers(0, 255, (3, 16, 17)).astype(np.uint8)
    stream = written(values, photometric="rgb", planarconfig="separate", compression="lzw")
    cut = io.BytesIO(stream.getvalue()[:-100])

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("dino.data.images.decode.read_tiff", fail)
    assert np.array_equal(levels(stream), values)
    with pytest.raises(ImageError, match="in the middle"):
        levels(written(values.astype(np.uint16), photometric="rgb", planarconfig="separate"))
    with pytest.raises(ImageError, match="in the middle") as caught:
        levels(cut)
    assert caught.value.defect == "damaged"


def test_where_pillow_fails_tifffile_is_tried() -> None:
    values = RNG.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    stream = written(values, photometric="rgb", compression="webp", compressionargs={"level": 100})
    stream.seek(0)
    expected = tifffile.imread(stream)
    with Image.open(stream) as picture, pytest.raises(OSError, match="decoder error"):
        picture.load()
    assert np.array_equal(levels(stream), np.moveaxis(expected, 2, 0))


def test_plain_pages_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = written(RNG.integers(0, 255, (16, 16, 3)).astype(np.uint8), photometric="rgb")
    deep = written(FIVE[0], photometric="minisblack")
    cut = io.BytesIO(plain.getvalue()[:-200])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert levels(plain).shape == (3, 16, 16)
    with pytest.raises(ImageError, match=r"is a TIFF that only tifffile .* 'dino-ssl\[tiff\]"):
        levels(deep)
    with pytest.raises(ImageError) as caught:
        levels(cut)
    assert caught.value.defect == "damaged"


def test_a_truncated_page_is_damaged_for_both() -> None:
    for compression in (None, "zlib", "lzw"):
        stream = written(
            RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8),
            photometric="rgb",
            compression=compression,
        )
        with pytest.raises(ImageError) as caught:
            levels(io.BytesIO(stream.getvalue()[:-3000]))
        assert caught.value.defect == "damaged"


# ---------------------------------------------------------------------------------- samples, types
@pytest.mark.parametrize("planar", ["separate", "contig"])
@pytest.mark.parametrize("channels", [2, 5, 9])
def test_tiff_samples_are_channels(planar: str, channels: int, tmp_path: Path) -> None:
    values = np.arange(channels * 16 * 17, dtype=np.uint16).reshape(channels, 16, 17) * 23
    stored = values if planar == "separate" else values.transpose(1, 2, 0)
    for name, options in (("a.tif", {}), ("b.tif", {"tile": (16, 16), "compression": "zlib"})):
        path = tiff(tmp_path / name, stored, planarconfig=planar, **options)
        assert np.array_equal(levels(path, channels), values // 257)
        assert np.array_equal(stored_values(path, PixelFormat(channels)), values)
        for wanted in (1, 3):
            assert f"it has {channels} channels, not {wanted}" in misfit(path, wanted)


@pytest.mark.parametrize("planar", ["separate", "contig"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_rgb_tiffs_of_eight_and_sixteen_bits(
    planar: str, compression: str | None, tmp_path: Path
) -> None:
    for kind, unit in ((np.uint8, 1), (np.uint16, 257)):
        values = (np.arange(3 * 16 * 17).reshape(3, 16, 17) % 256 * unit).astype(kind)
        stored = values if planar == "separate" else values.transpose(1, 2, 0)
        options = {"photometric": "rgb", "planarconfig": planar, "compression": compression}
        path = tiff(tmp_path / "a.tif", stored, **options)
        assert np.array_equal(levels(path), values // unit)


def test_tiff_pages_are_channels_or_chosen(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    tifffile.imwrite(path, FIVE, photometric="minisblack", metadata={"axes": "CYX"})
    assert np.array_equal(levels(path, 5), FIVE // 257)
    assert np.array_equal(levels(path, 1, 0), FIVE[:1] // 257)
    assert np.array_equal(levels(path, 1, 3), FIVE[3:4] // 257)
    assert np.array_equal(levels(path, 2, 3), FIVE[3:5] // 257)  # a range of pages
    grey = levels(path, 3, 3)
    assert np.array_equal(grey, np.broadcast_to(FIVE[3] // 257, (3, 6, 7)))
    for wanted in (1, 2, 3):  # never the first page three times
        words = f"it has 5 channels, not {wanted}: say --channels 5 .* or choose one by --page"
        assert re.search(words, misfit(path, wanted))
    assert "it has no page 7" in misfit(path, 1, 7)
    assert "it has 1 channel, not 2" in misfit(path, 2, 4)


def test_tiff_of_floats_in_channels(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 4 * 6 * 7, dtype=np.float32).reshape(4, 6, 7)
    path = tiff(tmp_path / "a.tif", values, planarconfig="separate")
    assert levels(path, 4).min() == 0
    assert levels(path, 4).max() == 255
    assert levels(path, 4, low=(-1.0,), high=(3.0,)).max() == 128


def test_complex_tiffs_are_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", np.ones((6, 7), np.complex64))
    for channels in (1, 3, 5):
        assert "complex64 is no image" in misfit(path, channels)
